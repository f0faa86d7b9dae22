"""Checkpoints of a training run: a stage's newest, best and milestones, saved while it goes on."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from lens_jax.checkpoints import arrays
from lens_jax.checkpoints.manifest import MANIFEST, absolute, check_manifest, write_manifest
from lens_jax.distribution import processes
from lens_jax.files import CheckpointError

log = logging.getLogger("lens_jax")


class TrainingCheckpoints:
    """The checkpoints of one stage: `directory/<step>/`, the last `keep`, the `keep_best` best, and
    those of `milestones`.

    A state is any pytree of arrays, typed random keys, ints and floats (parameters, optimizer
    state, step, random key, data position). It is saved as a flat dict from path to leaf. Every
    process of a run calls every method; each writes and reads what its devices hold, process 0
    the rest. The directory may be remote (gs://bucket/name).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int,
        keep_best: int = 0,
        milestones: Iterable[int] = (),
    ):
        self.directory = absolute(directory)
        self.keep, self.keep_best, self.milestones = keep, keep_best, frozenset(milestones)
        try:
            self.directory.exists()
        except ImportError as error:
            raise CheckpointError(f"{self.directory} cannot be reached: {error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[epath.Path, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Steps with a directory, ascending; not all of them need be complete."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Starts writing `state`; returns once its values are copied, so that they may be donated.

        Waits for the save before it, and raises what that one met. Checkpoints of this step or
        later belong to a course of training that has been left, and are removed.

        Args:
            score: of this state, for `keep_best`, the highest being best; None: never kept by it.

        Raises:
            CheckpointError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        target = self.directory / str(step)
        leaves = {
            name: np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else leaf
            for name, leaf in arrays.flatten(state).items()
        }
        try:
            processes.by_main(lambda: self._make_room(step))
        except Exception as error:
            raise self._failed(target, f"{error}") from error
        try:
            response = ocp.save_async(target, leaves)
        except Exception as error:
            if jax.process_count() > 1:  # the others wait inside of it: they end with this one
                raise
            raise self._failed(target, f"{error}") from error
        self._pending = target, self._thread.submit(self._finish, response, target, score)

    def _make_room(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        for old in self.steps():
            if old >= step:
                self._remove(old)

    def _finish(
        self, response: ocp.AsyncResponse[None], target: epath.Path, score: float | None
    ) -> None:
        response.result()
        if not processes.is_main():
            return
        write_manifest(target, score)
        try:
            self._prune()
        except OSError as error:
            log.warning("checkpoints that are not needed any more stay: %s", error)

    def _prune(self) -> None:
        complete = {s: self._score(s) for s in self.steps()}
        complete = {s: score for s, score in complete.items() if score is not None}
        scored = sorted((score, s) for s, score in complete.items() if score > -math.inf)
        best = [s for _, s in scored[::-1][: self.keep_best]]
        kept = {*best, *list(complete)[-self.keep :], *self.milestones}
        for step in self.steps():
            # What is not complete, a killed save has left after orbax's part of the work.
            if step not in kept or step not in complete:
                self._remove(step)

    def _score(self, step: int) -> float | None:
        """A complete checkpoint's score, -inf without one; None if it is not complete.

        Raises:
            OSError: its manifest is there, or may be, and cannot be read.
        """
        try:
            manifest = json.loads((self.directory / str(step) / MANIFEST).read_text())
            return float(manifest.get("score", -math.inf))
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None

    def _remove(self, step: int) -> None:
        # Without its manifest a directory is no checkpoint, however far its removal gets.
        (self.directory / str(step) / MANIFEST).unlink(missing_ok=True)
        (self.directory / str(step)).rmtree()

    def _remove_unfinished(self) -> None:
        """Removes what saves that were killed or failed have left."""
        if self.directory.is_dir():
            for entry in self.directory.iterdir():
                if ".orbax-checkpoint-tmp" in entry.name:
                    entry.rmtree()

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            CheckpointError: it could not be written, by whichever process.
        """
        if self._pending is None:
            return
        (target, pending), self._pending = self._pending, None
        error = pending.exception()
        reason = _first_reason(error)
        if reason is not None:
            raise self._failed(target, reason) from error

    def _failed(self, target: epath.Path, reason: str) -> "CheckpointError":
        """The error for a checkpoint that could not be written; makes room."""
        last = "those before it cannot be read now"
        with contextlib.suppress(OSError):
            if processes.is_main():
                self._remove_unfinished()
            kept = [str(step) for step in self.steps() if self._score(step) is not None]
            last = f"the last one is {self.directory / kept[-1]}" if kept else "there is none yet"
        return CheckpointError(
            f"checkpoint {target} could not be written, {last}: {' '.join(reason.split())}"
        )

    def latest(self) -> int | None:
        """The last complete step. Names every half-written or damaged one that it passes over.

        Raises:
            CheckpointError: all that were written to their end are damaged.
        """
        self.wait()
        return processes.by_main(self._latest)

    def _latest(self) -> int | None:
        damaged = 0
        for step in reversed(self.steps()):
            directory = self.directory / str(step)
            trouble = check_manifest(directory)
            if trouble is None:
                return step
            log.warning("checkpoint %s is left out: %s", directory, trouble)
            damaged += (directory / MANIFEST).exists()
        if damaged:
            raise CheckpointError(
                f"{self.directory}: every checkpoint there is damaged, as said above; bring one "
                "back, or remove the directory to begin this stage anew"
            )
        return None

    def best(self) -> int | None:
        """The complete step with the highest score, the later one of equals; None without any."""
        scores = {step: self._score(step) for step in self.steps()}
        scored = [step for step, score in scores.items() if score not in (None, -math.inf)]
        return max(scored, key=lambda step: (scores[step], step), default=None)

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step` (from `latest`, which verifies it) in the structure of `like`.

        `like` holds arrays or ShapeDtypeStructs (restored with their dtype and sharding; numpy
        arrays where they have no sharding), ints and floats. It may be a part of what was saved; a
        leaf that was not saved, or has another shape, is an error.
        """
        directory = self.directory / str(step)
        wanted = arrays.flatten(like)
        if not (directory / MANIFEST).exists():
            raise CheckpointError(f"{directory} is not a checkpoint")
        saved = ocp.metadata(directory).metadata
        missing = sorted(wanted.keys() - saved.keys())
        if missing:
            raise CheckpointError(f"{directory} does not hold {_few(missing)}")
        abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
        for name, leaf in abstract.items():
            if np.shape(leaf) != np.shape(saved[name]):
                raise CheckpointError(
                    f"{directory}: {name} has shape {np.shape(saved[name])}, "
                    f"this run needs {np.shape(leaf)}"
                )
        loaded = arrays.load(directory, abstract)
        leaves = [
            jax.random.wrap_key_data(loaded[name], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else loaded[name]
            for name, leaf in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def params(self, step: int) -> dict[str, np.ndarray]:
        """The trained parameters of a `TrainState`, alone: by path, layers stacked."""
        directory, prefix = self.directory / str(step), "state/params/"
        trouble = check_manifest(directory)
        if trouble is not None:
            raise CheckpointError(f"{directory} is no checkpoint: {trouble}")
        saved = ocp.metadata(directory).metadata
        wanted = {name: leaf for name, leaf in saved.items() if name.startswith(prefix)}
        loaded = arrays.load(directory, {n: np.empty(x.shape, x.dtype) for n, x in wanted.items()})
        return {n.removeprefix(prefix).removesuffix("/value"): x for n, x in loaded.items()}


def _first_reason(error: BaseException | None) -> str | None:
    """The error of whichever process met one; None if none did.

    Where one fails the others wait for it in vain: what they say is asked last.
    """
    reasons = processes.gather(error and (f"{error}" or type(error).__name__))
    found = [f"process {i}: {x}" if i else x for i, x in enumerate(reasons) if x is not None]
    return min(found, key=lambda reason: "barrier" in reason.lower(), default=None)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaf: Any) -> Any:
    """The form that orbax is asked for: without a sharding (keys too), a host array."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(data.shape, data.dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        if leaf.sharding is None:
            return np.empty(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
