"""The directory of a run: what it holds, whether a configuration fits it, and taking it."""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lens_jax import files, flags
from lens_jax.config import ConfigError, RunConfig, differences, dump_yaml, leaves, read_yaml
from lens_jax.training.metrics import EVALUATIONS, STAGES, last_step, read_scores

# What a converted start/ depends on.
CONVERTED = {"model.mllm", "model.sam", "model.num_queries", "seed"}


def inspect(directory: Path, config: RunConfig) -> dict[str, Any]:
    """Looks at what a run directory holds; changes nothing.

    Returns: finished: there is nothing left to do; begun: a step was taken; changed: keys that the
        run in it has other values for; reconvert: other weights are to be converted than were.

    Raises:
        ConfigError: another run is in it.
    """
    file = directory / "config.yaml"
    if not file.exists():
        return {"finished": False, "begun": False, "changed": [], "reconvert": False}
    before = read_yaml(file)
    taken = {stage: last_step(directory, stage) for stage in STAGES}
    begun = any(taken.values()) or (directory / "checkpoints").exists()
    if config.resume == "never" and begun:
        raise ConfigError(f"{directory} holds a run already, and resume is never")
    changed = differences(before, config)
    longer = [key for key in changed if key in [f"{stage}.steps" for stage in STAGES]]
    if begun and changed:
        if changed != longer[:1]:
            hint = _train_on(directory, before, config, changed) if longer else ""
            raise ConfigError(
                f"{directory} holds a run with another configuration ({', '.join(changed)}); "
                f"name another run_dir or remove it{hint}"
            )
        _check_steps(directory, before, config, changed[0].partition(".")[0], taken)
    return {
        "finished": (directory / "report.html").exists() and not changed,
        "begun": begun,
        "changed": changed,
        "reconvert": bool(CONVERTED.intersection(changed)),
    }


def _train_on(directory: Path, before: RunConfig, config: RunConfig, changed: list[str]) -> str:
    """The command that trains a finished run longer with other keys; empty for any other run."""
    final = directory / "final"
    if not (directory / "report.html").exists():
        return ""
    extra = {stage: getattr(config, stage).steps - getattr(before, stage).steps for stage in STAGES}
    steps = {f"{stage}.steps": max(0, more) for stage, more in extra.items()}
    if not any(steps.values()):
        return ""
    values = leaves(config)
    given = {key: values[key] for key in changed if key != "model.checkpoint"} | steps
    said = " ".join(f"--{key} {shlex.quote(flags.shown(v))}" for key, v in given.items())
    return (
        f"; to train longer, start from {final}: python launch/train.py "
        f"--config {directory / 'config.yaml'} --model.checkpoint {final} --run_dir ANOTHER {said}"
    )


def _check_steps(
    directory: Path, before: RunConfig, config: RunConfig, stage: str, taken: dict[str, int]
) -> None:
    """Raises ConfigError unless a run that has begun can go on to another number of steps."""
    old, new = (getattr(x, stage) for x in (before, config))
    key, final = f"{stage}.steps", directory / "final"
    if new.steps < taken[stage]:
        raise ConfigError(
            f"{directory} has taken {taken[stage]} steps of {stage}, more than {key} {new.steps}: "
            "name another run_dir, or give as many or more"
        )
    if not taken[stage] and not taken["grpo"]:
        return
    rollout = config.rollout
    if stage == "alignment" and taken["grpo"]:
        reason = f"stage 2 has begun after {old.steps} steps of stage 1"
    elif new.schedule != "constant":
        reason = f"{stage}.schedule is {new.schedule}, which ends at step {old.steps}"
    elif stage == "grpo" and rollout.final_temperature not in (None, rollout.temperature):
        reason = f"rollout.final_temperature is reached at step {old.steps}"
    else:
        return
    done = (directory / "report.html").exists()
    raise ConfigError(
        f"{directory} cannot go on to {key} {new.steps}: {reason}. To train longer, "
        f"{'' if done else f'end it with --{key} {old.steps}, then '}start from {final}: "
        f"--model.checkpoint {final} --run_dir ANOTHER"
        f"{' --alignment.steps 0' if stage == 'grpo' else ''} --{key} "
        f"{max(1, new.steps - old.steps)}"
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from training in a directory, if its file system has locks.

    Raises:
        ConfigError: one does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = None
    try:
        descriptor = files.lock(directory)
    except BlockingIOError:
        raise ConfigError(
            f"another process is training in {directory}: wait for its end, or name another run_dir"
        ) from None
    except OSError:
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def claim(directory: Path, config: RunConfig, found: dict[str, Any]) -> None:
    """Takes the run directory, and removes what no longer holds."""
    for name in ("start", "final", "data"):  # what a killed process was writing
        for unfinished in directory.glob(f".{name}.*"):
            shutil.rmtree(unfinished)
    if found["reconvert"]:
        shutil.rmtree(directory / "start", ignore_errors=True)
    # A finished run that goes on keeps final/ until the next one is ready.
    (directory / "report.html").unlink(missing_ok=True)
    if found["changed"]:
        ended = [f"after_{key.partition('.')[0]}" for key in found["changed"]]
        _forget_scores(directory, ended if found["begun"] else list(EVALUATIONS))
    # Last: until then a start that was killed finds its configuration changed.
    files.write_text(directory / "config.yaml", dump_yaml(config))


def _forget_scores(directory: Path, points: list[str]) -> None:
    """Removes evaluations of what is trained on or was another run's."""
    file = directory / "evaluation.json"
    if kept := {k: v for k, v in read_scores(file).items() if k not in points}:
        files.write_text(file, json.dumps(kept, indent=2) + "\n")
    else:
        file.unlink(missing_ok=True)
        shutil.rmtree(directory / "samples", ignore_errors=True)
    for point in points:
        (directory / "evaluation" / f"{point}.jsonl").unlink(missing_ok=True)
