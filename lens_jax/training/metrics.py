"""What a run logs: metrics.jsonl, TensorBoard, and the progress bar.

A row is written after update `step` (from 1) of its stage, so a checkpoint of step s goes with the
rows up to s.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

STAGES = ("alignment", "grpo")
METRICS = (
    "loss",
    "reward",
    "reward/format",
    "reward/box",
    "reward/segment",
    "mask_iou",
    "box_iou",
    "kl",
    "entropy",
    "completion_length",
    "grad_norm",
    "learning_rate",
    "rollout_gap",
    "truncated_fraction",
    "skipped_updates",
    "bad_samples",
    "rollout_seconds",
    "update_seconds",
    "tokens_per_second",
)
# What depends on the machine and the hour; all else is the same whenever a run is repeated.
TIMINGS = (
    "relayout_seconds",
    "rollout_seconds",
    "update_seconds",
    "tokens_per_second",
    "compilations",
    "seconds",
)
_COUNTS = ("skipped_updates", "bad_samples")
_FILE = "metrics.jsonl"


def row(stage: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One line of metrics.jsonl: every key of `METRICS` (null where the stage has none), then
    whatever else `metrics` (scalars, on device or host) holds. NaN and infinity become null."""
    values = {name: metrics.get(name) for name in METRICS}
    values |= {name: value for name, value in metrics.items() if name not in values}
    return {"stage": stage, "step": step} | {n: _number(n, v) for n, v in values.items()}


def _number(name: str, value: Any) -> int | float | None:
    if value is None or not math.isfinite(float(value)):
        return None
    return int(value) if name in _COUNTS else float(value)


def read(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a run; a last line that a killed process left unfinished is not one."""
    file = Path(run_dir) / _FILE
    if not file.is_file():
        return []
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def last_step(run_dir: str | os.PathLike[str], stage: str) -> int:
    """The last step of `stage` that a run has logged; 0 without any."""
    return max((row["step"] for row in read(run_dir) if row["stage"] == stage), default=0)


def cut(run_dir: str | os.PathLike[str], stage: str, step: int) -> None:
    """Drops the rows past `step` of `stage` and an unfinished last line; the rest in order.

    Later stages keep theirs: if the end of a stage has to be trained again, for its checkpoint was
    damaged, it ends the same, and a later one goes on from its own checkpoint.
    """
    rows = [r for r in read(run_dir) if r["stage"] != stage or r["step"] <= step]
    kept = sorted(rows, key=lambda r: (STAGES.index(r["stage"]), r["step"]))
    file = Path(run_dir) / _FILE
    unfinished = file.with_name(f".{_FILE}")
    unfinished.write_text("".join(json.dumps(r) + "\n" for r in kept))
    unfinished.replace(file)


class StageLog:
    """The log of one stage, from `step` (0, or the step restored) on; a context manager.

    with StageLog(run_dir, "grpo", steps=300, step=50) as log:
        log.write(51, metrics)
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], stage: str, *, steps: int, step: int = 0
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        cut(run_dir, stage, step)
        self.stage = stage
        self._rows = (run_dir / _FILE).open("a")
        # One directory a stage: steps start anew, and purge_step hides only this stage's lost rows.
        self._events = SummaryWriter(
            str(run_dir / "tensorboard" / stage), purge_step=step + 1, write_to_disk=True
        )
        self._bar = tqdm(
            total=steps,
            initial=step,
            desc=stage,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Logs one update and returns its row. Waits for `metrics` that are still on device."""
        line = row(self.stage, step, metrics)
        self._rows.write(json.dumps(line) + "\n")
        self._rows.flush()
        for name, value in line.items():
            if name not in ("stage", "step") and value is not None:
                self._events.add_scalar(name, value, step)
        self._bar.set_postfix_str(summary(line), refresh=False)
        self._bar.update(step - self._bar.n)
        return line

    def close(self) -> None:
        self._bar.close()
        self._events.close()
        self._rows.close()

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def summary(line: Mapping[str, Any]) -> str:
    """A row in a few words, for the progress bar."""
    shown = {
        "loss": ("loss", "{:.3f}") if line["reward"] is None else None,
        "reward": ("reward", "{:.3f}"),
        "box_iou": ("box IoU", "{:.3f}"),
        "mask_iou": ("mask IoU", "{:.3f}"),
        "tokens_per_second": ("tokens/s", "{:.0f}"),
    }
    return ", ".join(
        f"{how[0]} {how[1].format(line[name])}"
        for name, how in shown.items()
        if how and line[name] is not None
    )
