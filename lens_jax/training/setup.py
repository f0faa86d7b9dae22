"""Setting a run up: what can be checked before anything is written, then data and model."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lens_jax import checkpoints
from lens_jax.config import ConfigError, DataConfig, RunConfig, batch_rows, check_batches
from lens_jax.data import curriculum
from lens_jax.data.buckets import Buckets
from lens_jax.data.evaluation_batches import Evaluation
from lens_jax.data.processor import Processor
from lens_jax.data.sample import Source
from lens_jax.data.sources import Joined, folder, open_source
from lens_jax.distribution import processes, sharding
from lens_jax.inference import Generation, Lens
from lens_jax.models.lens import LensConfig, LensModel
from lens_jax.preparation import scenes, shapes_refcoco
from lens_jax.training import programs
from lens_jax.training.compilations import Compilations
from lens_jax.training.job import Job, say, stop_if_asked
from lens_jax.training.stopping import Stopping


@dataclasses.dataclass(frozen=True)
class Start:
    """The weights that a run starts from.

    Attributes:
        check: lens_config.json of the checkpoint that `make` gives, from files alone: it writes
            nothing. Told whether what an earlier start has converted still holds.
        make: the pretrained checkpoint; official weights are converted first.
    """

    check: Callable[[bool], dict[str, Any]]
    make: Callable[[], Path]


@dataclasses.dataclass
class Checked:
    """All that a run needs and that needed no writing.

    `sources` are those of training and evaluation; None for generated data, which is drawn first.
    """

    mesh: jax.sharding.Mesh
    start_config: dict[str, Any]
    lens_config: LensConfig
    model: LensModel
    sources: tuple[Source, Source] | None


def check(config: RunConfig, directory: Path, start: Start, *, converted: bool) -> Checked:
    """Checks all that can be checked before anything is written, converted or drawn."""
    mesh = sharding.make_mesh(config.mesh, rows=batch_rows(config))
    check_batches(config, mesh.shape["data"], mesh.shape["fsdp"])
    start_config = config.lens_config(processes.by_main(lambda: start.check(converted)))
    lens_config = checkpoints.model_shapes(directory / "start", start_config)
    model = programs.abstract_model(config, lens_config, mesh)
    sources = None
    if not config.data.generated:
        sources = _sources(config.data, Path(config.data.data_dir))
    elif config.data.data_dir is not None:
        _check_drawn(config.data)
    programs.check_rewards(config)
    return Checked(mesh, start_config, lens_config, model, sources)


def _scenes(data: DataConfig) -> dict[str, int]:
    return {"train": data.shapes.train_scenes, data.eval_split: data.shapes.eval_scenes}


def _check_drawn(data: DataConfig) -> None:
    """Raises ConfigError where scenes cannot be drawn into the folder that is named for them."""
    data_dir = Path(data.data_dir)
    if (data_dir / folder.FILE).exists():
        raise ConfigError(
            f"data.data_dir: {data_dir} holds {folder.FILE}, and no scenes are drawn into a "
            "folder of one's own: set data.dataset to folder, or data.shapes.train_scenes to 0"
        )
    try:
        found = shapes_refcoco.drawn_in(data_dir)
    except ValueError as error:
        raise ConfigError(f"data.data_dir: {error}") from error
    if found and (found["scenes"], found["seed"]) != (_scenes(data), data.shapes.seed):
        raise ConfigError(
            f"data.data_dir: {data_dir} holds other scenes than data.shapes asks for: set "
            "data.shapes.train_scenes to 0 to use them, or name another data.data_dir"
        )


def _sources(data: DataConfig, data_dir: Path) -> tuple[Source, Source]:
    """The data to train on, and the held-out data."""
    try:
        train = _train_source(data, data_dir)
        return train, open_source(data.dataset, data.eval_split, data_dir, evaluation=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def prepare(
    config: RunConfig,
    directory: Path,
    start: Path,
    checked: Checked,
    compilations: Compilations,
    stopping: Stopping,
) -> Job:
    """Draws or opens the data, and loads the model."""
    stop_if_asked(stopping)
    mesh, data = checked.mesh, config.data
    # Before the data and the weights, which take longer: a broken checkpoint is said at once.
    processor = Processor.from_pretrained(start)
    generation = dataclasses.replace(
        Generation.from_pretrained(start), max_new_tokens=config.rollout.max_new_tokens
    )
    if data.generated:
        say(processes.by_main(lambda: _draw(directory, data)))
        stop_if_asked(stopping)
    train_source, held_out = checked.sources or _sources(
        data, Path(data.data_dir or directory / "data")
    )
    buckets = Buckets(data.prompt_tokens, data.windows, data.canvas, data.answer_tokens)

    definition, state = nnx.split(checked.model)
    where = partial(sharding.parameter_sharding, mesh=mesh, axes=checked.lens_config.axes)
    _, params = checkpoints.load_pretrained(start, dtype=jnp.float32, sharding=where)
    params.pop("unused", None)
    nnx.replace_by_pure_dict(state, params)
    stop_if_asked(stopping)
    return Job(
        config=config,
        directory=directory,
        mesh=mesh,
        start=start,
        start_config=checked.start_config,
        model=definition,
        params=state,
        processor=processor,
        buckets=buckets,
        train_source=train_source,
        held_out=Evaluation(
            held_out,
            processor,
            sharding.equal_parts(data.eval_batch_size, mesh),
            buckets=buckets,
            limit=data.eval_limit,
            reasoning=data.reasoning,
            share=sharding.share(mesh),
        ),
        lens=Lens(definition, state, processor, generation, mesh),
        compilations=compilations,
        stopping=stopping,
    )


def _draw(directory: Path, data: DataConfig) -> str:
    """Draws the scenes, or finds them drawn; says where they are from."""
    if data.data_dir is None:
        return scenes.provide(directory, _scenes(data), data.shapes.seed)
    shapes_refcoco.write_refcoco(data.data_dir, _scenes(data), data.shapes.seed)
    return f"scenes: those in {data.data_dir}"


def _train_source(data: DataConfig, data_dir: Path) -> Source:
    """The data to train on: data sets joined, in the order of the curriculum if there is one."""
    names = data.mixture or (data.dataset,)
    sources = [open_source(name, data.split, data_dir) for name in names]
    if data.curriculum is None:
        return Joined(sources)
    rewards = [
        curriculum.read_rewards(data_dir / "refer_seg" / name / data.curriculum, name)
        for name in names
    ]
    if not data.mixture_weights:
        return curriculum.easy_first(sources, rewards)
    ordered = zip(sources, rewards, strict=True)
    return Joined([curriculum.easy_first([source], [reward]) for source, reward in ordered])
