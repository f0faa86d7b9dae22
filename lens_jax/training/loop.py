"""A run, from a pretrained checkpoint to a better one: both stages, evaluations, report.

Everything that a run is lies in its directory (see the README). A run that was stopped goes on at
its last complete checkpoint; what it had already evaluated is not evaluated again.
"""

import base64
import contextlib
import dataclasses
import functools
import json
import logging
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens_jax import checkpoints, files, flags
from lens_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    RunConfig,
    batch_rows,
    check_batches,
    differences,
    dump_yaml,
    leaves,
    read_yaml,
)
from lens_jax.data import curriculum
from lens_jax.data.pipeline import Buckets, Evaluation, EvaluationRow, Pipeline, Processor
from lens_jax.data.prompts import box_to_pixels
from lens_jax.data.sample import Source
from lens_jax.data.sources import Joined, folder, open_source
from lens_jax.distribution import processes, sharding
from lens_jax.evaluation import Row, evaluate
from lens_jax.inference import Generation, Lens
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel
from lens_jax.preparation import scenes, shapes
from lens_jax.progress import Bar, counted
from lens_jax.reports import drawing, report
from lens_jax.rewards import text_rewards
from lens_jax.training import programs
from lens_jax.training.bad_samples import too_many
from lens_jax.training.compilations import Compilations
from lens_jax.training.metrics import STAGES, StageLog, last_step, read_scores
from lens_jax.training.state import TrainState
from lens_jax.training.stopping import INTERRUPTED, Stopping

# What a converted start/ depends on.
CONVERTED = {"model.mllm", "model.sam", "model.num_queries", "seed"}
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


log = logging.getLogger("lens_jax")


class Stopped(Exception):
    """The run was asked to stop; the text says where it can go on."""


class NotFinite(Exception):
    """Too many updates in a row were left out; the text says what was saved."""


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
class Run:
    """What the stages share. `model` is the definition, `params` all of its parameters."""

    config: RunConfig
    directory: Path
    mesh: jax.sharding.Mesh
    start: Path
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

    def shapes(self) -> LensModel:
        """The model without its parameters."""
        return nnx.merge(self.model, jax.eval_shape(lambda: self.params))

    @functools.cached_property
    def relayout(self) -> Callable[[nnx.State], nnx.State]:
        """All parameters in the layout of sampling, for evaluations: compiled once."""
        kv_heads = self.lens.config.mllm.num_kv_heads
        return programs.make_relayout(self.config, self.mesh, self.params, kv_heads)

    def release(self) -> nnx.State:
        """The parameters, for a stage that sets them anew: nothing else holds on to them."""
        params, self.params, self.lens.state = self.params, None, None
        return params


def run(config: RunConfig, start: Start, stopping: Stopping) -> None:
    """Trains as `config` says.

    Raises:
        ConfigError: the directory holds another run, or the configuration does not fit.
        Stopped, KeyboardInterrupt: as `stopping` was asked to, with everything saved.
        NotFinite: after `max_skipped` updates in a row that were left out, with everything saved.
        CheckpointError: the last checkpoint of a stage or before a stop could not be written.
    """
    directory = Path(config.run_dir)
    _agree(config)
    found = processes.by_main(lambda: _inspect(directory, config))
    if found["finished"]:
        _say(f"{directory} is finished: see {directory / 'report.html'}")
        return
    stopping.where = "nothing had been trained"
    if found["begun"]:
        stopping.where = f"{directory} goes on at its last checkpoint"
    with programs.precision(config), Compilations() as compilations:
        checked = _check(config, directory, start, converted=not found["reconvert"])
        _stop_if_asked(stopping)
        processes.by_main(lambda: _claim(directory, config, found))
        job = _prepare(config, directory, start.make(), checked, compilations, stopping)
        score(job, "before")
        if config.alignment.steps:
            align(job)
            score(job, "after_alignment")
        if config.grpo.steps:
            reinforce(job)
            score(job, "after_grpo")
        finish(job)
    _say(compilations)


def _asked(stopping: Stopping) -> bool:
    """Whether any process was asked to stop; all then end with the same exit code."""
    asked, interrupted = processes.total(stopping.asked, stopping.code == INTERRUPTED)
    if interrupted:
        stopping.code = INTERRUPTED
    return bool(asked)


def _stop_if_asked(stopping: Stopping) -> None:
    if _asked(stopping):
        raise Stopped(f"stopped: {stopping.where}")


def _say(text: Any) -> None:
    """Prints, once for all processes."""
    if processes.is_main():
        print(text)


# ---- the stages ----------------------------------------------------------------------------------


def align(job: Run) -> None:
    """Stage 1: the context module learns to prompt SAM."""
    settings = job.config.alignment
    stage = programs.build_alignment(job.config, job.mesh, job.shapes())
    trained, frozen = stage.split(job.release())

    @jax.jit
    def tokens_read(batch: Batch):
        return batch.prompts.length.sum() + batch.targets.answer_length.sum()

    def step(state: TrainState, batch: Batch):
        begin = time.perf_counter()
        state, metrics = stage.update(state, frozen, batch)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - begin
        tokens = int(jax.device_get(tokens_read(batch)))
        return state, metrics | {"update_seconds": seconds, "tokens_per_second": tokens / seconds}

    state = stage.create(trained)
    state = _train(job, "alignment", settings, state, step, stage.schedule, first_sample=0)
    job.params = nnx.State.merge(state.params, frozen)


def reinforce(job: Run) -> None:
    """Stage 2: GRPO from the rewards, with the segmentation loss."""
    config, settings = job.config, job.config.grpo
    stage = programs.build_reinforcement(
        config,
        job.mesh,
        job.shapes(),
        read_text=text_rewards(job.processor.tokenizer),
        end_tokens=job.lens.generation.end_tokens,
    )
    trained, frozen = stage.split(job.release())
    policy = stage.policy(trained, frozen)
    reference = stage.lighten(policy) if stage.needs_reference else None
    base = None
    if config.rollout.policy == "base":
        base = jax.block_until_ready(stage.relayout(policy))
    del policy

    longest_of = jax.jit(jnp.max, out_shardings=sharding.replicated(job.mesh))

    def step(state: TrainState, batch: Batch):
        times, index = [time.perf_counter()], int(jax.device_get(state.step))
        policy = base
        if policy is None:
            policy = jax.block_until_ready(stage.relayout(stage.policy(state.params, frozen)))
        times.append(time.perf_counter())
        written = jax.block_until_ready(stage.write(policy, batch, state.step))
        del policy  # the update needs its memory
        longest = int(jax.device_get(longest_of(written.lengths)))
        written = stage.trim(written, min(n for n in stage.completion_tokens if n >= longest))
        times.append(time.perf_counter())
        state, metrics = stage.update(state, frozen, reference, batch, written)
        metrics = jax.device_get(metrics)
        times.append(time.perf_counter())
        tokens = metrics["completion_length"] * written.lengths.size
        relaid, rolled, updated = np.diff(times)
        return state, metrics | {
            "relayout_seconds": relaid,
            "rollout_seconds": rolled,
            "update_seconds": updated,
            "tokens_per_second": tokens / (times[-1] - times[0]),
            "temperature": stage.temperatures[index],
        }

    # Stage 2 goes on in the data where stage 1 stopped: no scene is needed twice.
    first = config.alignment.steps * config.alignment.batch_size
    state = stage.create(trained)
    state = _train(job, "grpo", settings, state, step, stage.schedule, first_sample=first)
    job.params = nnx.State.merge(state.params, frozen)


def _train(
    job: Run,
    stage: str,
    settings: Any,
    state: TrainState,
    step: Step,
    schedule: Callable[[int], Any],
    *,
    first_sample: int,
) -> TrainState:
    """Steps from the last complete checkpoint of the stage to its end."""
    config = job.config
    place = config.checkpoint.directory or job.directory / "checkpoints"
    store = checkpoints.TrainingCheckpoints(
        f"{place}/{stage}",
        config.checkpoint.keep,
        config.checkpoint.keep_best,
        config.checkpoint.milestones,
    )
    key, done = jax.random.key(config.seed), store.latest() or 0
    at = {"position": first_sample, "bad_samples": 0, "skipped_in_row": 0}
    taken = {s: processes.by_main(partial(last_step, job.directory, s)) for s in STAGES}
    if done > settings.steps:
        raise ConfigError(
            f"{store.directory / str(done)} is past {stage}.steps {settings.steps}: give as many "
            "steps or more, or another run_dir"
        )
    if not done:
        every = config.checkpoint.every
        processes.by_main(lambda: _refuse_to_forget(job.directory, stage, store.directory, every))
        if taken[stage]:
            _say(
                f"{job.directory}: begins {stage} again at step 1 of {settings.steps}; no "
                f"checkpoint holds the {taken[stage]} steps it has logged"
            )
    else:
        saved = store.restore(done, {"state": vacate(state), "key": key} | at)
        state, at = saved["state"], {name: int(saved[name]) for name in at}
        if not any(taken[later] for later in STAGES[STAGES.index(stage) + 1 :]):
            _say(
                f"{job.directory}: goes on at {stage} step {done} of {settings.steps}, from "
                f"{store.directory / str(done)}"
            )
    job.stopping.where = f"{job.directory} goes on at {stage} step {done} of {settings.steps}"
    if done == settings.steps:
        return state
    pipeline = Pipeline(
        job.train_source,
        job.processor,
        settings.batch_size,
        config.seed,
        buckets=job.buckets,
        weights=config.data.mixture_weights or None,
        shuffle=config.data.curriculum is None,
        reasoning=config.data.reasoning,
        start=at["position"],
        share=sharding.share(job.mesh),
    )
    batches = _ahead(pipeline, job.mesh)
    bad_before, skipped = at["bad_samples"], int(jax.device_get(state.skipped))
    scores: list[float] = []  # since the last checkpoint

    def save(step: int, *, must: bool) -> None:
        """A checkpoint that cannot be written ends the run only if it `must` be."""
        value = float(np.mean(scores))
        scores.clear()
        try:
            store.wait()  # for the one before: its failure does not cost this one
        except checkpoints.CheckpointError as error:
            _warn("%s. Training goes on.", error)
        try:
            store.save(step, {"state": state, "key": key} | at, _score(config.checkpoint, value))
            if must:
                store.wait()
        except checkpoints.CheckpointError as error:
            if must:
                raise
            _warn("%s. Training goes on.", error)

    with contextlib.ExitStack() as stack:
        if processes.is_main():
            rows = StageLog(job.directory, stage, steps=settings.steps, step=done)
            stack.enter_context(rows)
        for index in range(done, settings.steps):
            batch, upcoming, bad, shrunken = next(batches)
            compiled = job.compilations.count
            # What a step needs is on device already: a hidden transfer would be a mistake.
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch)
            job.stopping.hold()
            bad, shrunken = processes.total(bad, shrunken)
            rate = schedule(index - skipped)  # an update left out is no step of the optimizer
            in_row = at["skipped_in_row"] + 1 if metrics["skipped_updates"] > skipped else 0
            skipped = int(metrics["skipped_updates"])
            at = {"position": upcoming, "bad_samples": bad_before + bad, "skipped_in_row": in_row}
            metrics |= {
                "learning_rate": float(rate),
                "bad_samples": at["bad_samples"],
                "shrunken_masks": shrunken,
                "compilations": job.compilations.count - compiled,
            }
            if processes.is_main():
                rows.write(index + 1, metrics)
            if in_row:
                ids = list(range(upcoming - settings.batch_size, upcoming))
                left_out = "%s step %d is left out: loss or gradient is not finite; sample ids %s"
                _warn(left_out, stage, index + 1, ids)
            scores.append(metrics.get(config.checkpoint.best_by, math.nan))
            seen = upcoming - first_sample
            if too_many(at["bad_samples"], seen, config.data.max_bad):
                try:
                    store.wait()  # one that is being written is what to go on from
                except checkpoints.CheckpointError as error:
                    _warn("%s", error)
                raise ConfigError(
                    f"{at['bad_samples']} of {seen} samples of {stage} could not be used, clearly "
                    f"more than data.max_bad {config.data.max_bad} allows; the log names them: "
                    "mend them, or raise --data.max_bad"
                )
            stopping = _asked(job.stopping)
            hopeless = in_row >= config.max_skipped
            if hopeless:
                at["skipped_in_row"] = 0  # so that whoever goes on has as many tries
            ends = index + 1 == settings.steps or stopping or hopeless
            due = (index + 1) % config.checkpoint.every == 0
            if ends or due or index + 1 in config.checkpoint.milestones:
                save(index + 1, must=ends)
            if hopeless:
                raise NotFinite(
                    f"{stage} step {index + 1}: loss or gradient was not finite {in_row} times in "
                    f"a row (max_skipped); parameters as they were before are saved in "
                    f"{store.directory / str(index + 1)}"
                )
            if stopping:
                raise Stopped(
                    f"stopped after {stage} step {index + 1} of {settings.steps}; saved in "
                    f"{store.directory / str(index + 1)}, where the same command goes on"
                )
    end = f"{stage} step {settings.steps} of {settings.steps}"
    job.stopping.where = f"{job.directory} goes on at {end}"
    job.stopping.release()
    return state


def vacate(state: TrainState) -> TrainState:
    """The shapes and places of a state that another one replaces; its memory is given back.

    Whoever called still names it: without this it would lie beside the other for a whole stage.
    """

    def give_back(x: jax.Array) -> jax.ShapeDtypeStruct:
        x.delete()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(give_back, state)


def _refuse_to_forget(directory: Path, stage: str, place: Any, every: int) -> None:
    """Raises ConfigError if a stage without a checkpoint has taken steps enough for one."""
    taken = last_step(directory, stage)
    if taken > 2 * every:  # the second save waits for the first
        raise ConfigError(
            f"{directory} has logged {taken} steps of {stage}, and {place} holds no checkpoint of "
            "them: name their checkpoint.directory, or, if there never was one, remove "
            "metrics.jsonl to begin this stage anew"
        )


def _warn(text: str, *values: Any) -> None:
    """Warns, once for all processes."""
    if processes.is_main():
        log.warning(text, *values)


def _score(checkpoint: CheckpointConfig, value: float) -> float | None:
    """Of a checkpoint, from its mean of `best_by`."""
    if not math.isfinite(value):
        return None
    return -value if checkpoint.best_by == "loss" else value


def _ahead(pipeline: Pipeline, mesh: jax.sharding.Mesh) -> Iterator[tuple[Batch, int, int, int]]:
    """Batches on device, each brought there by a thread while the one before it is in use.

    With each come the pipeline's position and count of bad samples after it, and how many of its
    masks are shrunken.
    """

    def bring() -> tuple[Batch, int, int, int]:
        before = pipeline.shrunken_masks
        batch = sharding.global_batch(next(pipeline), mesh)
        shrunken = pipeline.shrunken_masks - before
        return batch, pipeline.position, pipeline.bad_samples, shrunken

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(bring)
        while True:
            batch = coming.result()
            coming = pool.submit(bring)
            yield batch


# ---- around the stages ---------------------------------------------------------------------------


def _agree(config: RunConfig) -> None:
    """Raises ConfigError, in every process, if one was started with another configuration."""
    mine = leaves(config)
    mine = {key: value for key, value in mine.items() if not key.startswith("distributed.")}
    first, *others = processes.gather(mine)
    for number, other in enumerate(others, start=1):
        changed = [key for key in first if first[key] != other[key]]
        if changed:
            raise ConfigError(
                f"process {number} was started with another configuration than process 0 "
                f"({', '.join(changed)}); all need the same flags and the same file"
            )


def _inspect(directory: Path, config: RunConfig) -> dict[str, Any]:
    """What a run directory holds; changes nothing.

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


def _claim(directory: Path, config: RunConfig, found: dict[str, Any]) -> None:
    """Takes the run directory, and removes what no longer holds."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("start", "final", "data"):  # what a killed process was writing
        for unfinished in directory.glob(f".{name}.*"):
            shutil.rmtree(unfinished)
    if found["reconvert"]:
        shutil.rmtree(directory / "start", ignore_errors=True)
    # A finished run that goes on keeps final/ until the next one is ready.
    (directory / "report.html").unlink(missing_ok=True)
    if found["changed"]:
        ended = [f"after_{key.partition('.')[0]}" for key in found["changed"]]
        _forget_scores(directory, ended if found["begun"] else list(report.EVALUATIONS))
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


@dataclasses.dataclass
class Checked:
    """What a run needs and could be had without writing. The sources of generated data are None:
    they are drawn first."""

    mesh: jax.sharding.Mesh
    start_config: dict[str, Any]
    lens_config: LensConfig
    model: LensModel
    sources: tuple[Source, Source] | None


def _check(config: RunConfig, directory: Path, start: Start, *, converted: bool) -> Checked:
    """Whatever can be checked before anything is written, converted or drawn."""
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
        found = shapes.drawn_in(data_dir)
    except ValueError as error:
        raise ConfigError(f"data.data_dir: {error}") from error
    if found and (found["scenes"], found["seed"]) != (_scenes(data), data.shapes.seed):
        raise ConfigError(
            f"data.data_dir: {data_dir} holds other scenes than data.shapes asks for: set "
            "data.shapes.train_scenes to 0 to use them, or name another data.data_dir"
        )


def _sources(data: DataConfig, data_dir: Path) -> tuple[Source, Source]:
    """What is trained on, and what is held out."""
    try:
        train = _train_source(data, data_dir)
        return train, open_source(data.dataset, data.eval_split, data_dir, evaluation=True)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _prepare(
    config: RunConfig,
    directory: Path,
    start: Path,
    checked: Checked,
    compilations: Compilations,
    stopping: Stopping,
) -> Run:
    """Data and model."""
    _stop_if_asked(stopping)
    mesh, data = checked.mesh, config.data
    # Before the data and the weights, which take longer: a broken checkpoint is said at once.
    processor = Processor.from_pretrained(start)
    generation = dataclasses.replace(
        Generation.from_pretrained(start), max_new_tokens=config.rollout.max_new_tokens
    )
    if data.generated:
        _say(processes.by_main(lambda: _draw(directory, data)))
        _stop_if_asked(stopping)
    train_source, held_out = checked.sources or _sources(
        data, Path(data.data_dir or directory / "data")
    )
    buckets = Buckets(data.prompt_tokens, data.windows, data.canvas, data.answer_tokens)

    definition, state = nnx.split(checked.model)
    kv_heads = checked.lens_config.mllm.num_kv_heads
    place = partial(sharding.place, mesh=mesh, kv_heads=kv_heads)
    _, params = checkpoints.load_pretrained(start, dtype=jnp.float32, sharding=place)
    params.pop("unused", None)
    nnx.replace_by_pure_dict(state, params)
    _stop_if_asked(stopping)
    return Run(
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
    """The generated scenes, and in words where they are from."""
    if data.data_dir is None:
        return scenes.provide(directory, _scenes(data), data.shapes.seed)
    shapes.write_refcoco(data.data_dir, _scenes(data), data.shapes.seed)
    return f"scenes: those in {data.data_dir}"


def _train_source(data: DataConfig, data_dir: Path) -> Source:
    """What a run trains on: its data sets joined, by the curriculum if there is one."""
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


def score(job: Run, point: str) -> None:
    """Evaluates on the held-out split, once: evaluation.json, a file of rows, sample pictures."""
    file = job.directory / "evaluation.json"
    scores = processes.by_main(lambda: read_scores(file))
    if point in scores:
        return
    job.lens.state = job.params
    if sharding.num_parts(job.mesh) > 1:  # gathered once, and not for every token
        job.lens.state = job.relayout(job.params)
    total = job.held_out.num_expressions
    shown = {round(i) for i in np.linspace(0, total - 1, min(job.config.samples, total))}
    drawn: dict[int, dict[str, Any]] = {}

    def batches(data):
        for batch in Bar(
            data,
            desc=f"evaluating {report.EVALUATIONS[point]}",
            unit="batch",
            disable=not processes.is_main(),
        ):
            _stop_if_asked(job.stopping)
            yield batch

    def show(row: Row, asked: EvaluationRow, mask: np.ndarray) -> None:
        if row.number in shown:
            box = row.box and box_to_pixels(row.box, mask.shape, asked.coordinate_scale).tolist()
            packed = base64.b64encode(np.packbits(mask)).decode()
            drawn[row.number] = {"box": box, "mask": packed}

    data = job.config.data
    scores[point], rows = evaluate(
        job.lens,
        job.held_out,
        dataset=data.dataset,
        split=data.eval_split,
        progress=batches,
        show=show,
    )
    job.lens.state = job.params
    drawn = dict(item for part in processes.gather(list(drawn.items())) for item in part)
    if processes.is_main():
        for number, answer in sorted(drawn.items()):
            _show(job, point, rows[number], **answer)
        folder = job.directory / "evaluation"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows]
        files.write_text(folder / f"{point}.jsonl", "".join(lines))
        files.write_text(file, json.dumps(scores, indent=2) + "\n")
    boxes = scores[point]["box_iou"]
    _say(
        f"{report.EVALUATIONS[point]}: {'' if boxes is None else f'box IoU {boxes:.3f}, '}"
        f"gIoU {scores[point]['giou']:.3f}, cIoU {scores[point]['ciou']:.3f} "
        f"on {counted(len(rows), 'held-out sample')}"
    )


def _show(job: Run, point: str, row: Row, box: list[float] | None, mask: str) -> None:
    """A sample picture with an answer: a box in pixels, and a mask's packed bits in base64."""
    sample, expression = job.held_out.expression(row.number)
    size = sample.image.shape[:2]
    bits = np.frombuffer(base64.b64decode(mask), np.uint8)
    mask = np.unpackbits(bits, count=math.prod(size)).reshape(size).astype(bool)
    answer = drawing.Answer(
        report.EVALUATIONS[point], row.completion, box, mask, row.box_iou, row.iou
    )
    drawing.add_panel(
        job.directory / "samples" / f"{row.number:05d}.png",
        sample.image,
        expression,
        sample.box,
        sample.mask,
        answer,
    )


def finish(job: Run) -> None:
    """Writes the trained model as a pretrained checkpoint, and the report."""
    final = job.directory / "final"

    def params():
        yield from checkpoints.unstack(nnx.to_pure_dict(job.params))
        unused = [n for n in checkpoints.saved_params(job.start) if n.startswith("unused/")]
        yield from checkpoints.read_params(job.start, unused)

    # What is there may be what a shorter training ended with.
    processes.by_main(lambda: shutil.rmtree(final, ignore_errors=True))
    checkpoints.save_pretrained(final, params(), job.start_config, files_from=job.start)
    processes.by_main(lambda: str(report.write(job.directory)))
    _say(f"{final}: the trained model\n{job.directory / 'report.html'}: the report")
