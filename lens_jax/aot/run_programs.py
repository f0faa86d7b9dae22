"""The programs that a run calls, with the shapes it calls them with on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lens_jax.aot import shapes
from lens_jax.config import RunConfig
from lens_jax.data.buckets import Buckets
from lens_jax.distribution import sharding
from lens_jax.inference import programs as inference
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel
from lens_jax.rewards.sentence import TextScorer
from lens_jax.rollout.sampling import GREEDY
from lens_jax.training import programs


@dataclasses.dataclass(frozen=True)
class Program:
    """One program with the shapes it is called with, and what lies beside it meanwhile."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    """The arguments by what they are: parameters, moments, ..."""
    beside: dict[str, Any]
    """Arrays on the chip besides the arguments, by what they are."""
    while_trips: int | None = None
    """Most steps of a loop whose end the data decide."""
    caches: int = 0
    """Bytes per chip of keys and values, part of the temporaries."""
    shorter: bool = False
    """Whether another program is the same for longer completions."""


def list_programs(
    config: RunConfig,
    lens: LensConfig,
    mesh: Mesh,
    *,
    stages: Sequence[str],
    read_text: TextScorer,
    end_tokens: Sequence[int],
    repetition_penalty: float,
) -> Iterator[Program]:
    """The programs of a run at the largest bucket of each input, updates at each of completions.

    `stages` may hold `evaluation` besides: what a run does before the first, and after each.
    """
    model = programs.abstract_model(config, lens, mesh)
    if "alignment" in stages and config.alignment.steps:
        yield from _alignment(config, mesh, model)
    if "grpo" in stages and config.grpo.steps:
        yield from _reinforcement(config, mesh, model, read_text, end_tokens)
    if "evaluation" in stages:
        yield from _evaluation(config, mesh, model, end_tokens, repetition_penalty)


def _evaluation(config, mesh, model, end_tokens, repetition_penalty) -> Iterator[Program]:
    """The program that reshards, and those that `Lens.respond` runs, with the parameters beside.

    Each reads a part of the model, all of which is on the chip.
    """
    axes = model.config.axes
    definition, params = nnx.split(model)
    params = shapes.placed(params, sharding.shardings(params, mesh, axes))
    copy, named = params, {"parameters": params}
    if sharding.num_parts(mesh) > 1:
        reshard = programs.make_reshard(config, mesh, params, axes)
        light = jax.eval_shape(reshard, params)
        copy = shapes.placed(light, sharding.sampling_shardings(light, mesh, axes))
        yield Program("evaluation.relayout", reshard, (params,), named=named, beside={})
    beside = {} if copy is params else named
    named = named if copy is params else {"sampling copy": copy}

    rows = sharding.equal_parts(config.data.eval_batch_size, mesh)
    longest = config.rollout.max_new_tokens
    batch = _batch(config, model, rows, mesh)
    prompts, ids = batch.prompts, batch.sample_id
    key = shapes.placed(jax.eval_shape(partial(jax.random.key, 0)), sharding.replicated(mesh))
    sampling = dataclasses.replace(GREEDY, repetition_penalty=repetition_penalty)
    limit = inference.bucket_length(longest)
    generate = partial(inference.generate, definition=definition, max_new_tokens=limit)
    arguments = (copy, prompts, ids, key, sampling, np.array(end_tokens, np.int32), ids)
    by_rows = sharding.batch_sharding(mesh)
    written, embedded, hidden = shapes.placed(jax.eval_shape(generate, *arguments), by_rows)
    yield Program(
        "evaluation.write",
        jax.jit(generate, keep_unused=True),
        arguments,
        named=named | {"batch": prompts},
        beside=beside,
        while_trips=longest - 1,
        caches=_cache_bytes(config, model, mesh, rows, 1, copy),
    )
    if hidden is None:
        encode = partial(inference.encode_queries, definition=definition)
        tokens = shapes.array((rows, written.tokens.shape[2]), jnp.int32, by_rows)
        arguments = (copy, prompts, embedded, tokens, ids)
        yield Program(
            "evaluation.read",
            jax.jit(encode, keep_unused=True),
            arguments,
            named=named | {"batch": arguments[1:]},
            beside=beside,
        )
        hidden = shapes.placed(jax.eval_shape(encode, *arguments), by_rows)
    decode = partial(inference.decode_masks, definition=definition)
    yield Program(
        "evaluation.draw",
        jax.jit(decode, keep_unused=True),
        (copy, prompts.sam_pixels, hidden),
        named=named | {"batch": (prompts.sam_pixels, hidden)},
        beside=beside | {"batch": dataclasses.replace(prompts, sam_pixels=None)},
    )


def _alignment(config, mesh, model) -> Iterator[Program]:
    stage = programs.build_alignment(config, mesh, model)
    state, frozen = _state(stage, mesh, model)
    batch = _batch(config, model, config.alignment.batch_size, mesh)
    yield Program(
        "alignment.update",
        stage.update,
        (state, frozen, batch),
        named=_by_name(state, frozen) | {"batch": batch},
        beside={"next batch": batch},
    )


def _reinforcement(config, mesh, model, read_text, end_tokens) -> Iterator[Program]:
    stage = programs.build_reinforcement(
        config, mesh, model, read_text=read_text, end_tokens=end_tokens
    )
    axes = model.config.axes
    state, frozen = _state(stage, mesh, model)
    batch = _batch(config, model, config.grpo.batch_size, mesh)
    step = shapes.placed(state.step, sharding.replicated(mesh))
    policy = stage.policy(state.params, frozen)
    light = jax.eval_shape(stage.reshard, policy)
    copy = shapes.placed(light, sharding.sampling_shardings(light, mesh, axes))
    reference = shapes.placed(light, sharding.shardings(light, mesh, axes))
    rows = sharding.batch_sharding(mesh)
    written = shapes.placed(jax.eval_shape(stage.sample, copy, batch, step), rows)

    if not stage.needs_reference:
        reference = None
    on_chip = _by_name(state, frozen) | {"reference": reference}
    batches = {"batch": batch, "next batch": batch}
    base = {"sampling copy": copy} if config.rollout.policy == "base" else {}
    rest = {name: x for name, x in on_chip.items() if name != "parameters"}
    yield Program(
        "grpo.relayout",
        stage.reshard,
        (policy,),
        named={"parameters": policy},
        # The policy's are arguments, trained or frozen; the other parts' lie beside.
        beside=rest
        | {"parameters": _without(state.params, policy), "frozen": _without(frozen, policy)}
        | batches,
    )

    settings = config.grpo
    yield Program(
        "grpo.rollout",
        stage.sample,
        (copy, batch, step),
        named={"sampling copy": copy, "batch": batch},
        beside=on_chip | {"next batch": batch},
        while_trips=config.rollout.max_new_tokens - 1,
        caches=_cache_bytes(
            config, model, mesh, settings.batch_size, settings.num_generations, copy
        ),
    )
    for length in stage.completion_tokens:
        cut = dataclasses.replace(
            written,
            tokens=shapes.array((*written.tokens.shape[:2], length), jnp.int32, rows),
            log_probs=shapes.array((*written.tokens.shape[:2], length), jnp.float32, rows),
        )
        yield Program(
            f"grpo.update[{length}]",
            stage.update,
            (state, frozen, reference, batch, cut),
            named=on_chip | {"batch": batch, "completions": cut},
            beside={"next batch": batch} | base,
            shorter=length < stage.completion_tokens[-1],
        )


def _cache_bytes(config, model, mesh, rows: int, num_completions: int, copy) -> int:
    """Keys and values a chip of prompts and completions: of the heads that its queries read."""
    mllm = model.config.mllm
    heads = mllm.num_kv_heads // math.gcd(mllm.num_kv_heads, mesh.shape["tensor"])
    prompt = max(config.data.prompt_tokens)
    tokens = prompt + num_completions * config.rollout.max_new_tokens
    share = rows // sharding.num_parts(mesh)
    itemsize = jax.tree.leaves(copy)[0].dtype.itemsize
    return 2 * mllm.num_layers * share * tokens * heads * mllm.head_dim * itemsize


def _batch(config: RunConfig, model: LensModel, rows: int, mesh: Mesh) -> Batch:
    """A batch of `rows` prompts at the largest bucket of each kind."""
    data = config.data
    buckets = Buckets(data.prompt_tokens, data.windows, data.canvas, data.answer_tokens).largest()
    (windows,), (prompt,), (answer,) = buckets.windows, buckets.prompt_tokens, buckets.answer_tokens
    return shapes.batch(
        model.config,
        rows,
        slots=(windows, model.config.mllm.vision.window_patches),
        prompt=prompt,
        answer=answer,
        canvas=buckets.largest_canvas,
        sharding=sharding.batch_sharding(mesh),
    )


def _state(stage: programs.Stage, mesh: Mesh, model) -> tuple[Any, Any]:
    """The training state and the frozen parameters as they lie on the mesh."""
    axes = model.config.axes
    return tuple(
        shapes.placed(x, sharding.shardings(x, mesh, axes))
        for x in (jax.eval_shape(stage.create, stage.trained), stage.frozen)
    )


def _by_name(state, frozen) -> dict[str, Any]:
    return {"parameters": state.params, "moments": state.moments, "frozen": frozen}


def _without(tree: Any, part: Any) -> Any:
    """The leaves of `tree` that are not in `part`."""
    paths = {path for path, _ in jax.tree.leaves_with_path(part)}
    return [x for path, x in jax.tree.leaves_with_path(tree) if path not in paths]
