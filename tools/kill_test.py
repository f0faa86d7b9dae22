"""Kills a run again and again and proves that nothing was lost: `python tools/kill_test.py --help`.

A run is started twice: once left alone, once killed (SIGKILL) at random moments and started again
until it is through. Both must end with the same bits: parameters, metrics (timings apart) and
evaluations. Moments are drawn from three kinds: before the first step of a process, some steps
later, and while a checkpoint is being written.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401

# isort: split
from lens_jax import checkpoints
from lens_jax.commands import cli
from lens_jax.flags import NonNegativeInt, PositiveFloat, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
# The tiny run, made short; a checkpoint every other step.
SHORT = {
    "data.shapes.train_scenes": 60,
    "data.shapes.eval_scenes": 4,
    "data.eval_batch_size": 8,
    "samples": 2,
    "alignment.steps": 60,
    "alignment.batch_size": 2,
    "alignment.warmup_steps": 5,
    "grpo.steps": 60,
    "grpo.batch_size": 2,
    "grpo.num_generations": 2,
    "rollout.max_new_tokens": 24,
    "checkpoint.every": 2,
    "mesh.data": 1,
}
START = 20.0  # seconds: kills of the first kind come before, and before a step is done
ROWS = 8  # of the second kind: after at most so many steps of the process
SAVES = 3  # of the third kind: during one of the first so many saves of the process
WITHIN = 0.1  # seconds after the step or after a save has begun


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill; steps count over both stages."""

    kind: str
    seconds: float
    step: int  # the last one that was logged
    saved: int  # the last one with a complete checkpoint


class Victim:
    """A run that can be started, watched and killed."""

    def __init__(self, directory: Path, flags: Sequence[str]):
        self.directory = directory
        self.command = [sys.executable, str(ROOT / "launch" / "train.py"), *flags]
        self.command += ["--run_dir", str(directory)]

    def start(self) -> subprocess.Popen:
        # A cache of its own: kills may leave half of a compiled program in it.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.directory.parent / "compiled")}
        with self.directory.with_suffix(".log").open("a") as output:
            return subprocess.Popen(
                self.command, stdout=output, stderr=output, cwd=ROOT, env=cache | os.environ
            )

    def finish(self) -> None:
        if self.start().wait():
            raise cli.UsageError(f"the run failed: see {self.directory.with_suffix('.log')}")

    def rows(self) -> int:
        file = self.directory / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def saving(self) -> set[str]:
        found = self.directory.glob("checkpoints/*/*.orbax-checkpoint-tmp*")
        return {f"{path.parent.name}/{path.name}" for path in found}

    def saved(self) -> int:
        """Steps, over both stages, that the last complete checkpoint holds."""
        stages = self.directory / "checkpoints"
        complete = {
            stage: [int(file.parent.name) for file in stages.glob(f"{stage}/*/manifest.json")]
            for stage in ("alignment", "grpo")
        }
        return sum(max(steps, default=0) for steps in complete.values())

    def kill(self, kind: str, count: int, delay: float) -> Kill | None:
        """Starts the run and kills it; None if it ended before that.

        Args:
            kind: `start`, `step` (after `count` of them) or `save` (in the `count`-th).
            delay: seconds, after the start (the first step at the latest), the step, or the
                beginning of the save.
        """
        process, begin = self.start(), time.perf_counter()
        seen, rows = self.saving(), self.rows()
        while process.poll() is None:
            # Rows past the checkpoint are cut when the run goes on: count up from there.
            rows = min(rows, self.rows())
            before, seen = seen, self.saving()
            if kind == "save":
                count -= len(seen - before)
                ready = count <= 0
            elif kind == "step":
                ready = self.rows() >= rows + count
            else:
                ready = self.rows() > rows or time.perf_counter() > begin + delay
            if ready:
                break
            time.sleep(0.001)
        if kind != "start":
            time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            return None
        return Kill(kind, time.perf_counter() - begin, self.rows(), self.saved())


def kill_test(
    work_dir: Path,
    kills: PositiveInt = 25,
    seed: NonNegativeInt = 0,
    minutes: PositiveFloat | None = None,
    flags: list[str] | None = None,
) -> int:
    """Proves that a run survives being killed.

    Args:
        work_dir: Where both runs and kills.jsonl go; called again, it goes on with what is there.
        kills: How often the run is killed.
        seed: Of the moments.
        minutes: Stop after so many; the same command goes on.
        flags: Of launch/train.py, instead of a short form of configs/tiny.yaml.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    if flags is None:
        flags = [str(x) for key, value in SHORT.items() for x in (f"--{key}", value)]
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    whole, victim = (Victim(work_dir / name, flags) for name in ("whole", "killed"))
    if not (whole.directory / "report.html").exists():
        whole.finish()
    file = work_dir / "kills.jsonl"
    done = (
        [Kill(**json.loads(line)) for line in file.read_text().splitlines()]
        if file.exists()
        else []
    )
    while len(done) < kills:
        if time.monotonic() > end:
            print(f"{len(done)} of {kills} kills; the same command goes on")
            return 3
        moment = random.Random(f"{seed}/{len(done)}")
        kind = moment.choice(("start", "step", "save"))
        count = moment.randint(1, ROWS if kind == "step" else SAVES)
        kill = victim.kill(kind, count, moment.uniform(0, START if kind == "start" else WITHIN))
        if kill is None:
            raise cli.UsageError(f"the run ended before kill {len(done) + 1}: give it more steps")
        done.append(kill)
        with file.open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(kill)) + "\n")
        print(
            f"{len(done):3} {kill.kind:5} after {kill.seconds:5.1f} s, at step {kill.step}, "
            f"{kill.step - kill.saved} past the last checkpoint",
            flush=True,
        )
    victim.finish()
    differences = compare(whole.directory, victim.directory)
    print("\n".join(differences) or f"{len(done)} kills: the same bits as without")
    return int(bool(differences))


def compare(ours: Path, theirs: Path) -> list[str]:
    """In what two finished runs differ, timings apart; a line each."""
    differences = []
    mine, other = (dict(checkpoints.iterate_params(run / "final")) for run in (ours, theirs))
    if mine.keys() != other.keys():
        differences.append("final: other tensors")
    differences += [
        f"final: {name}"
        for name in mine.keys() & other.keys()
        if mine[name].tobytes() != other[name].tobytes()
    ]
    from lens_jax.training import metrics

    rows = [[_lasting(row) for row in metrics.read(run)] for run in (ours, theirs)]
    if len(rows[0]) != len(rows[1]):
        differences.append(f"metrics.jsonl: {len(rows[0])} and {len(rows[1])} rows")
    differences += [
        f"metrics.jsonl: {a['stage']} step {a['step']}"
        for a, b in zip(*rows, strict=False)
        if a != b
    ]
    scores = [json.loads((run / "evaluation.json").read_text()) for run in (ours, theirs)]
    scores = [{point: _lasting(s) for point, s in run.items()} for run in scores]
    if scores[0] != scores[1]:
        differences.append("evaluation.json")
    for file in sorted((ours / "evaluation").iterdir()):
        if _rows(ours, file.name) != _rows(theirs, file.name):
            differences.append(f"evaluation/{file.name}")
    return differences


def _rows(run: Path, name: str) -> str:
    """Rows of an evaluation; pictures that the run generated lie in its directory."""
    return (run / "evaluation" / name).read_text().replace(str(run.resolve()), "")


def _lasting(row: dict[str, Any]) -> dict[str, Any]:
    from lens_jax.training import metrics

    return {key: value for key, value in row.items() if key not in metrics.TIMINGS}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(
        kill_test,
        argv,
        prog="tools/kill_test.py",
        example="  python tools/kill_test.py --work_dir /tmp/kills --kills 25",
    )


if __name__ == "__main__":
    sys.exit(main())
