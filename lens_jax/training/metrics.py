"""The log of a run: metrics.jsonl, TensorBoard, and the progress bar.

A row is written after update `step` (from 1) of its stage, so a checkpoint of step s goes with the
rows up to s.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from lens_jax import files
from lens_jax.progress import Bar

# Names in files and flags -> what a person reads.
STAGE_TITLES = {"alignment": "alignment (stage 1)", "grpo": "GRPO (stage 2)"}
STAGES = tuple(STAGE_TITLES)
# Evaluations in the order they happen: keys of evaluation.json -> headings.
EVALUATIONS = {
    "before": "before",
    "after_alignment": f"after {STAGE_TITLES['alignment']}",
    "after_grpo": f"after {STAGE_TITLES['grpo']}",
}
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
_COUNTS = ("skipped_updates", "bad_samples", "shrunken_masks")
METRICS_FILE = "metrics.jsonl"
# TensorBoard's file is brought to disk so often, and at the end.
FLUSH_SECONDS = 30

log = logging.getLogger("lens_jax")


class RunError(Exception):
    """A file of a run that is not what the run wrote; the text names it."""


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
    """The rows of a run; a last line that a killed process left unfinished is not one.

    Raises:
        RunError: another line is no row.
    """
    file = Path(run_dir) / METRICS_FILE
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    return [_read_row(file, n, line) for n, line in enumerate(lines[:-1], start=1) if line]


def _read_row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if row["stage"] in STAGES and type(row["step"]) is int:
            return row
    except (ValueError, TypeError, KeyError):
        pass
    raise RunError(f"{file}, line {number}: it is no row of a run; remove the line")


def read_scores(file: Path) -> dict[str, dict[str, Any]]:
    """evaluation.json; empty where there is none yet. Raises RunError."""
    try:
        scores = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise RunError(f"{file} is not JSON: remove it, to evaluate again ({error})") from error
    if not isinstance(scores, dict) or not all(isinstance(x, dict) for x in scores.values()):
        raise RunError(f"{file} holds no scores of a run: remove it, to evaluate again")
    return scores


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
    text = "".join(json.dumps(r) + "\n" for r in kept)
    files.write_text(Path(run_dir) / METRICS_FILE, text)


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
        if (last := last_step(run_dir, stage)) < step:
            log.warning(
                "rows %d to %d of %s are lost: they were not on disk", last + 1, step, stage
            )
        self.stage = stage
        # Unbuffered, as what a full disk refuses is kept here and written when there is room again.
        self._rows = (run_dir / METRICS_FILE).open("ab", buffering=0)
        self._unwritten, self._warned = b"", False
        # One directory a stage: steps start anew, and the start of a session hides only this
        # stage's lost rows. Not through SummaryWriter: its thread ends at a disk that is full, and
        # whoever logs then waits for it without end.
        folder = run_dir / "tensorboard" / stage
        folder.mkdir(parents=True, exist_ok=True)
        self._events: EventsWriter | None = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._bar = Bar(
            total=steps,
            initial=step,
            desc=STAGE_TITLES[stage],
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Logs one update and returns its row. Waits for `metrics` that are still on device."""
        line = row(self.stage, step, metrics)
        self._unwritten += f"{json.dumps(line)}\n".encode()
        self._write_rows()
        shown = {n: x for n, x in line.items() if n not in ("stage", "step") and x is not None}
        values = [Summary.Value(tag=name, simple_value=x) for name, x in shown.items()]
        self._write_event(Event(step=step, summary=Summary(value=values)))
        self._bar.set_postfix_str(summary(line), refresh=False)
        self._bar.update(step - self._bar.n)
        return line

    def _write_rows(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._rows.write(self._unwritten) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                log.warning("%s: %s. Its rows are kept until they can be.", self._rows.name, error)
            self._warned = True

    def _write_event(self, event: Event) -> None:
        if self._events is None:
            return
        event.wall_time = time.time()
        try:
            self._events.write_event(event)
            if time.monotonic() - self._flushed >= FLUSH_SECONDS:  # it waits for the disk
                self._events.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._events = None
            log.warning("TensorBoard is told no more of %s: %s", self.stage, error)

    def close(self) -> None:
        self._bar.close()
        self._write_rows()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            log.warning("%s: its last %d rows are lost", self._rows.name, lost)
        for file in filter(None, (self._rows, self._events)):
            try:
                file.close()
            except OSError as error:
                log.warning("%s: the end of its log may be lost: %s", self.stage, error)

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
