"""A run in the course of its work: what its stages share, and how it is asked to stop."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lens_jax.config import RunConfig
from lens_jax.data.buckets import Buckets
from lens_jax.data.evaluation_batches import Evaluation
from lens_jax.data.processor import Processor
from lens_jax.data.sample import Source
from lens_jax.distribution import processes
from lens_jax.inference import Lens
from lens_jax.models.lens import LensModel
from lens_jax.training import programs
from lens_jax.training.compilations import Compilations
from lens_jax.training.stopping import INTERRUPTED, Stopping

log = logging.getLogger("lens_jax")


class Stopped(Exception):
    """The run was asked to stop; the text says where it can go on."""


class NotFinite(Exception):
    """Too many updates in a row were left out; the text says what was saved."""


@dataclasses.dataclass
class Job:
    """A run's configuration, model, data and state of stopping, shared by its stages.

    `model` is the definition, `params` all of its parameters.
    """

    config: RunConfig
    directory: Path
    mesh: jax.sharding.Mesh
    start: Path
    """The pretrained checkpoint that the run starts from, and its lens_config.json."""
    start_config: dict[str, Any]
    model: nnx.GraphDef
    params: nnx.State
    processor: Processor
    buckets: Buckets
    train_source: Source
    held_out: Evaluation
    lens: Lens
    compilations: Compilations
    stopping: Stopping
    evaluated: bool = False
    """An evaluation has run, so its programs are compiled."""

    def shapes(self) -> LensModel:
        """The model without its parameters."""
        return nnx.merge(self.model, jax.eval_shape(lambda: self.params))

    @functools.cached_property
    def reshard(self) -> Callable[[nnx.State], nnx.State]:
        """All parameters in the layout of sampling, for evaluations: compiled once."""
        axes = self.lens.config.axes
        return programs.make_reshard(self.config, self.mesh, self.params, axes)

    def release(self) -> nnx.State:
        """The parameters, for a stage that sets them anew: nothing else holds on to them."""
        params, self.params, self.lens.state = self.params, None, None
        return params


def asked_to_stop(stopping: Stopping) -> bool:
    """True in all processes once any was asked to stop; all then end with the same exit code."""
    asked, interrupted = processes.total(stopping.asked, stopping.code == INTERRUPTED)
    if interrupted:
        stopping.code = INTERRUPTED
    return bool(asked)


def stop_if_asked(stopping: Stopping) -> None:
    """Raises Stopped if any process was asked to stop."""
    if asked_to_stop(stopping):
        raise Stopped(f"stopped: {stopping.where}")


def say(text: Any) -> None:
    """Prints, once for all processes."""
    if processes.is_main():
        print(text)


def warn(text: str, *values: Any) -> None:
    """Warns, once for all processes."""
    if processes.is_main():
        log.warning(text, *values)
