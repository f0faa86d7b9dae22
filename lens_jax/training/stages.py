"""The two stages, and the loop that takes the steps of either.

A stage builds its programs, makes its first state, and says what one step is. `train` does the
rest, in this order: resume, read a batch, step, log, save, stop.
"""

import contextlib
import math
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

from lens_jax.checkpoints import CheckpointError, TrainingCheckpoints
from lens_jax.config import ConfigError, StageConfig
from lens_jax.data.pipeline import Pipeline
from lens_jax.distribution import processes, sharding
from lens_jax.models.inputs import Batch
from lens_jax.rewards import text_rewards
from lens_jax.training import programs
from lens_jax.training.bad_samples import too_many
from lens_jax.training.job import Job, NotFinite, Stopped, asked_to_stop, say, warn
from lens_jax.training.metrics import STAGES, StageLog, last_step
from lens_jax.training.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def align(job: Job) -> None:
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
    state = train(job, "alignment", settings, state, step, stage.schedule, first_sample=0)
    job.params = nnx.State.merge(state.params, frozen)


def reinforce(job: Job) -> None:
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
    reference = stage.cast(policy) if stage.needs_reference else None
    base = None
    if config.rollout.policy == "base":
        base = jax.block_until_ready(stage.reshard(policy))
    del policy

    longest_of = jax.jit(jnp.max, out_shardings=sharding.replicated(job.mesh))

    def step(state: TrainState, batch: Batch):
        times, index = [time.perf_counter()], int(jax.device_get(state.step))
        policy = base
        if policy is None:
            policy = jax.block_until_ready(stage.reshard(stage.policy(state.params, frozen)))
        times.append(time.perf_counter())
        rollout = jax.block_until_ready(stage.sample(policy, batch, state.step))
        del policy  # the update needs its memory
        longest = int(jax.device_get(longest_of(rollout.lengths)))
        rollout = stage.trim(rollout, min(n for n in stage.completion_tokens if n >= longest))
        times.append(time.perf_counter())
        state, metrics = stage.update(state, frozen, reference, batch, rollout)
        metrics = jax.device_get(metrics)
        times.append(time.perf_counter())
        tokens = metrics["completion_length"] * rollout.lengths.size
        resharded, sampled, updated = np.diff(times)
        return state, metrics | {
            "relayout_seconds": resharded,
            "rollout_seconds": sampled,
            "update_seconds": updated,
            "tokens_per_second": tokens / (times[-1] - times[0]),
            "temperature": stage.temperatures[index],
        }

    # Stage 2 goes on in the data where stage 1 stopped: no scene is needed twice.
    first = config.alignment.steps * config.alignment.batch_size
    state = stage.create(trained)
    state = train(job, "grpo", settings, state, step, stage.schedule, first_sample=first)
    job.params = nnx.State.merge(state.params, frozen)


def train(
    job: Job,
    stage: str,
    settings: StageConfig,
    state: TrainState,
    step: Step,
    schedule: Callable[[int], Any],
    *,
    first_sample: int,
) -> TrainState:
    """Takes the steps of a stage, from its last complete checkpoint to its end.

    Args:
        state: the stage's first state; its memory goes to the one that is restored, if any.
        first_sample: where the stage begins in the order of the data.
    """
    config, folder = job.config, job.config.checkpoint.directory or job.directory / "checkpoints"
    saving = config.checkpoint
    store = TrainingCheckpoints(
        f"{folder}/{stage}", saving.keep, saving.keep_best, saving.milestones
    )

    # ---- resume ----
    key, done = jax.random.key(config.seed), store.latest() or 0
    at = {"position": first_sample, "bad_samples": 0, "skipped_in_row": 0}
    logged = {name: processes.by_main(partial(last_step, job.directory, name)) for name in STAGES}
    if done > settings.steps:
        raise ConfigError(
            f"{store.directory / str(done)} is past {stage}.steps {settings.steps}: give as many "
            "steps or more, or another run_dir"
        )
    if done:
        saved = store.restore(done, {"state": vacate(state), "key": key} | at)
        state, at = saved["state"], {name: int(saved[name]) for name in at}
        if not any(logged[later] for later in STAGES[STAGES.index(stage) + 1 :]):
            say(
                f"{job.directory}: goes on at {stage} step {done} of {settings.steps}, from "
                f"{store.directory / str(done)}"
            )
    else:
        processes.by_main(
            lambda: refuse_to_forget(job.directory, stage, store.directory, saving.every)
        )
        if logged[stage]:
            say(
                f"{job.directory}: begins {stage} again at step 1 of {settings.steps}; no "
                f"checkpoint holds the {logged[stage]} steps it has logged"
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
    with contextlib.ExitStack() as stack:
        if processes.is_main():
            log = StageLog(job.directory, stage, steps=settings.steps, step=done)
            stack.enter_context(log)
        for number in range(done + 1, settings.steps + 1):
            # ---- step ----
            batch, position, bad, shrunken = next(batches)
            compiled = job.compilations.count
            # What a step needs is on device already: a hidden transfer would be a mistake.
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch)
            job.stopping.hold()

            # ---- log ----
            bad, shrunken = processes.total(bad, shrunken)
            rate = schedule(number - 1 - skipped)  # an update left out is no step of the optimizer
            in_row = at["skipped_in_row"] + 1 if metrics["skipped_updates"] > skipped else 0
            skipped = int(metrics["skipped_updates"])
            at = {"position": position, "bad_samples": bad_before + bad, "skipped_in_row": in_row}
            metrics |= {
                "learning_rate": float(rate),
                "bad_samples": at["bad_samples"],
                "shrunken_masks": shrunken,
                "compilations": job.compilations.count - compiled,
            }
            if processes.is_main():
                log.write(number, metrics)
            if in_row:
                ids = list(range(position - settings.batch_size, position))
                left_out = "%s step %d is left out: loss or gradient is not finite; sample ids %s"
                warn(left_out, stage, number, ids)
            scores.append(metrics.get(saving.best_by, math.nan))
            seen = position - first_sample
            if too_many(at["bad_samples"], seen, config.data.max_bad):
                try:
                    store.wait()  # one that is being written is what to go on from
                except CheckpointError as error:
                    warn("%s", error)
                raise ConfigError(
                    f"{at['bad_samples']} of {seen} samples of {stage} could not be used, clearly "
                    f"more than data.max_bad {config.data.max_bad} allows; the log names them: "
                    "mend them, or raise --data.max_bad"
                )

            # ---- save ----
            stopping = asked_to_stop(job.stopping)
            hopeless = in_row >= config.max_skipped
            if hopeless:
                at["skipped_in_row"] = 0  # so that whoever goes on has as many tries
            ends = number == settings.steps or stopping or hopeless
            if ends or number % saving.every == 0 or number in saving.milestones:
                mean = float(np.mean(scores)) * (-1 if saving.best_by == "loss" else 1)
                scores.clear()
                contents = {"state": state, "key": key} | at
                _save(store, number, contents, mean if math.isfinite(mean) else None, must=ends)

            # ---- stop ----
            if hopeless:
                raise NotFinite(
                    f"{stage} step {number}: loss or gradient was not finite {in_row} times in "
                    f"a row (max_skipped); parameters as they were before are saved in "
                    f"{store.directory / str(number)}"
                )
            if stopping:
                raise Stopped(
                    f"stopped after {stage} step {number} of {settings.steps}; saved in "
                    f"{store.directory / str(number)}, where the same command goes on"
                )
    end = f"{stage} step {settings.steps} of {settings.steps}"
    job.stopping.where = f"{job.directory} goes on at {end}"
    job.stopping.release()
    return state


def vacate(state: TrainState) -> TrainState:
    """Gives back the memory of a state that another one replaces; returns its shapes and shardings.

    The caller still refers to the state, and would keep both alive for the whole stage.
    """

    def give_back(x: jax.Array) -> jax.ShapeDtypeStruct:
        x.delete()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(give_back, state)


def refuse_to_forget(directory: Path, stage: str, store: Any, every: int) -> None:
    """Raises ConfigError if a stage without a checkpoint has taken steps enough for one."""
    taken = last_step(directory, stage)
    if taken > 2 * every:  # the second save waits for the first
        raise ConfigError(
            f"{directory} has logged {taken} steps of {stage}, and {store} holds no checkpoint of "
            "them: name their checkpoint.directory, or, if there never was one, remove "
            "metrics.jsonl to begin this stage anew"
        )


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


def _save(
    store: TrainingCheckpoints, step: int, contents: Any, score: float | None, *, must: bool
) -> None:
    """Saves a checkpoint. One that cannot be written ends the run only if it `must` be."""
    try:
        store.wait()  # for the one before: its failure does not cost this one
    except CheckpointError as error:
        warn("%s. Training goes on.", error)
    try:
        store.save(step, contents, score)
        if must:
            store.wait()
    except CheckpointError as error:
        if must:
            raise
        warn("%s. Training goes on.", error)
