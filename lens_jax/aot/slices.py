"""What the programs of a run take on a slice of TPUs that is not there.

They are the programs that the loop calls, compiled from shapes for the slice's devices. Added to
what each needs by itself is what else lies on a chip while it runs.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax import inference
from lens_jax.aot import flops, hlo, tpu
from lens_jax.config import RunConfig, batch_rows, check_batches
from lens_jax.data.pipeline import Buckets
from lens_jax.distribution import sharding
from lens_jax.models.inputs import Batch, Prompts, Targets
from lens_jax.models.lens import LensConfig
from lens_jax.rewards.sentence import Score
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
    """What is on the chip but no argument."""
    while_trips: int | None = None
    """The most that a loop whose end the data decide can run."""
    caches: int = 0
    """Bytes a chip of keys and values, part of the temporaries."""
    shorter: bool = False
    """Another program is the same for longer completions."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice, or several alike, with the mesh that a run makes of it."""

    topology: str
    mesh: Mesh

    @classmethod
    def of(cls, topology: str, config: RunConfig, slices: int = 1) -> "Slice":
        """Raises tpu.TopologyError, ConfigError."""
        tpu.chip(topology)
        devices = tpu.devices(topology, slices)
        mesh = sharding.make_mesh(config.mesh, devices, rows=batch_rows(config))
        check_batches(config, mesh.shape["data"], mesh.shape["fsdp"])
        return cls(topology, mesh)

    @property
    def chip(self) -> tpu.Chip:
        return tpu.chip(self.topology)


def list_programs(
    config: RunConfig,
    shapes: LensConfig,
    mesh: Mesh,
    *,
    stages: Sequence[str],
    read_text: Score,
    end_tokens: Sequence[int],
    repetition_penalty: float,
) -> Iterator[Program]:
    """The programs of a run at the largest bucket of each input, updates at each of completions.

    `stages` may hold `evaluation` besides: what a run does before the first, and after each.
    """
    model = programs.abstract_model(config, shapes, mesh)
    if "alignment" in stages and config.alignment.steps:
        yield from _alignment(config, mesh, model)
    if "grpo" in stages and config.grpo.steps:
        yield from _reinforcement(config, mesh, model, read_text, end_tokens)
    if "evaluation" in stages:
        yield from _evaluation(config, mesh, model, end_tokens, repetition_penalty)


def _evaluation(config, mesh, model, end_tokens, repetition_penalty) -> Iterator[Program]:
    """The re-layout, and what `Lens.respond` runs; parameters alone lie beside.

    Each of these reads a part of the model, and all of it is there.
    """
    kv_heads = model.config.mllm.num_kv_heads
    definition, params = nnx.split(model)
    params = _placed(params, sharding.shardings(params, mesh, kv_heads=kv_heads))
    copy, named = params, {"parameters": params}
    if sharding.num_parts(mesh) > 1:
        relayout = programs.make_relayout(config, mesh, params, kv_heads)
        light = jax.eval_shape(relayout, params)
        copy = _placed(light, sharding.sampling_shardings(light, mesh, kv_heads=kv_heads))
        yield Program("evaluation.relayout", relayout, (params,), named=named, beside={})
    beside = {} if copy is params else named
    named = named if copy is params else {"sampling copy": copy}

    rows = sharding.equal_parts(config.data.eval_batch_size, mesh)
    longest = config.rollout.max_new_tokens
    batch = batch_shapes(config, model.config, rows, mesh)
    prompts, ids = batch.prompts, batch.sample_id
    key = _placed(jax.eval_shape(partial(jax.random.key, 0)), sharding.replicated(mesh))
    sampling = dataclasses.replace(GREEDY, repetition_penalty=repetition_penalty)
    write = partial(
        inference.write, definition=definition, max_new_tokens=inference.round_up(longest)
    )
    arguments = (copy, prompts, ids, key, sampling, np.array(end_tokens, np.int32), ids)
    by_rows = sharding.batch_sharding(mesh)
    written, embedded, hidden = _placed(jax.eval_shape(write, *arguments), by_rows)
    yield Program(
        "evaluation.write",
        jax.jit(write, keep_unused=True),
        arguments,
        named=named | {"batch": prompts},
        beside=beside,
        while_trips=longest - 1,
        caches=_cache_bytes(config, model, mesh, rows, 1, copy),
    )
    if hidden is None:
        read = partial(inference.read, definition=definition)
        tokens = _shape((rows, written.tokens.shape[2]), jnp.int32, by_rows)
        arguments = (copy, prompts, embedded, tokens, ids)
        yield Program(
            "evaluation.read",
            jax.jit(read, keep_unused=True),
            arguments,
            named=named | {"batch": arguments[1:]},
            beside=beside,
        )
        hidden = _placed(jax.eval_shape(read, *arguments), by_rows)
    draw = partial(inference.draw, definition=definition)
    yield Program(
        "evaluation.draw",
        jax.jit(draw, keep_unused=True),
        (copy, prompts.sam_pixels, hidden),
        named=named | {"batch": (prompts.sam_pixels, hidden)},
        beside=beside | {"batch": dataclasses.replace(prompts, sam_pixels=None)},
    )


def _alignment(config, mesh, model) -> Iterator[Program]:
    stage = programs.build_alignment(config, mesh, model)
    state, frozen = _state(stage, mesh, model)
    batch = batch_shapes(config, model.config, config.alignment.batch_size, mesh)
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
    kv_heads = model.config.mllm.num_kv_heads
    state, frozen = _state(stage, mesh, model)
    batch = batch_shapes(config, model.config, config.grpo.batch_size, mesh)
    step = _placed(state.step, NamedSharding(mesh, P()))
    policy = stage.policy(state.params, frozen)
    light = jax.eval_shape(stage.relayout, policy)
    copy = _placed(light, sharding.sampling_shardings(light, mesh, kv_heads=kv_heads))
    reference = _placed(light, sharding.shardings(light, mesh, kv_heads=kv_heads))
    rows = sharding.batch_sharding(mesh)
    written = _placed(jax.eval_shape(stage.write, copy, batch, step), rows)

    if not stage.needs_reference:
        reference = None
    on_chip = _by_name(state, frozen) | {"reference": reference}
    batches = {"batch": batch, "next batch": batch}
    base = {"sampling copy": copy} if config.rollout.policy == "base" else {}
    rest = {name: x for name, x in on_chip.items() if name != "parameters"}
    yield Program(
        "grpo.relayout",
        stage.relayout,
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
        stage.write,
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
            tokens=_shape((*written.tokens.shape[:2], length), jnp.int32, rows),
            log_probs=_shape((*written.tokens.shape[:2], length), jnp.float32, rows),
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


def batch_shapes(config: RunConfig, shapes: LensConfig, rows: int, mesh: Mesh) -> Batch:
    """A batch of `rows` prompts at the largest bucket of each kind."""
    data = config.data
    buckets = Buckets(data.prompt_tokens, data.windows, data.canvas, data.answer_tokens).largest()
    vision = shapes.mllm.vision
    (prompt,), (windows,), (answer,) = buckets.prompt_tokens, buckets.windows, buckets.answer_tokens
    patches, side = vision.window_patches, shapes.sam.image_size
    place = sharding.batch_sharding(mesh)

    def of(*sizes: int, dtype=jnp.int32):
        return _shape((rows, *sizes), dtype, place)

    prompts = Prompts(
        patches=of(windows, patches, vision.patch_dim, dtype=jnp.float32),
        patch_positions=of(windows, patches, 2),
        patch_mask=of(windows, patches, dtype=jnp.bool_),
        tokens=of(prompt),
        image_index=of(prompt),
        length=of(),
        positions=of(3, prompt),
        next_position=of(),
        sam_pixels=of(side, side, 3, dtype=jnp.uint8),
    )
    targets = Targets(
        box=of(4, dtype=jnp.float32),
        mask=of(*buckets.largest_canvas, dtype=jnp.bool_),
        mask_size=of(2),
        answer=of(answer),
        answer_length=of(),
    )
    return Batch(prompts, targets, sample_id=of())


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program; bytes, FLOPs and milliseconds are those of one chip."""

    name: str
    fits: bool
    hbm_bytes_per_chip: int
    """Arguments, results, temporaries and code of the program alone, at its peak."""
    hbm_limit: int
    resident: dict[str, int]
    """All that lies on the chip while the program runs, by what it is."""
    resident_bytes_per_chip: int
    flops_per_chip: int
    traffic_bytes_per_chip: int | None = None
    collective_bytes_per_chip: int | None = None
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes by kind."""
    estimated_ms: float | None = None
    """Cycles that the compiler scheduled, times loop lengths; without kernels and collectives."""
    model_flops_utilisation_bound: float | None = None
    """If arithmetic, memory and interconnect overlap wholly."""
    compile_seconds: float = 0.0
    error: str | None = None


def compile_program(
    program: Program, mesh: Mesh, chip: tpu.Chip, *, hopeless: bool = True
) -> tuple[Compiled, str | None]:
    """The report on a program, and its scheduled HLO; None if it does not fit.

    Args:
        hopeless: compiles it as well where all that lies on the chip beside temporaries does not
            fit: the program alone may.
    """
    operations = (
        flops.count(program.function, *program.arguments, while_trips=program.while_trips)
        // mesh.size
    )
    named = {name: bytes_per_chip(x) for name, x in program.named.items()}
    beside = {name: bytes_per_chip(x) for name, x in program.beside.items()}
    resident = {name: named.get(name, 0) + beside.get(name, 0) for name in named | beside}
    common = dict(name=program.name, hbm_limit=int(chip.memory), flops_per_chip=operations)
    resident["caches"] = program.caches
    if (least := sum(resident.values())) > chip.memory and not hopeless:
        return Compiled(
            **common,
            fits=False,
            hbm_bytes_per_chip=sum(named.values()) + program.caches,
            resident=resident,
            resident_bytes_per_chip=least,
            error="even without temporaries: not compiled",
        ), None
    begin = time.perf_counter()
    lowered = program.function.lower(*program.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := _too_much(str(error), chip.memory)) is None:
            raise
        resident["temporaries"] = max(0, needed - sum(named.values()) - program.caches)
        return Compiled(
            **common,
            fits=False,
            hbm_bytes_per_chip=needed,
            resident=resident,
            resident_bytes_per_chip=sum(resident.values()),
            compile_seconds=time.perf_counter() - begin,
            error=str(error).splitlines()[0],
        ), None
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    code = memory.generated_code_size_in_bytes
    # Not its sum of parts: libtpu's size of temporaries counts holes between them as well.
    needed = memory.peak_memory_in_bytes + code
    # The compiler pads arguments: what they take beyond their elements counts as temporary.
    resident["code"] = code
    resident["temporaries"] = needed - sum(named.values()) - program.caches - code
    total = sum(resident.values())
    text = compiled.as_text()
    module = hlo.Module(text)
    trips = program.while_trips or 1
    moved = module.collective_bytes(unknown_trips=trips)
    traffic = module.traffic(unknown_trips=trips)
    cycles = module.cycles(unknown_trips=trips)
    bound = max(
        cycles / chip.clock,
        operations / chip.flops,
        traffic / chip.bandwidth,
        sum(moved.values()) / chip.interconnect,
    )
    return Compiled(
        **common,
        fits=total <= chip.memory,
        hbm_bytes_per_chip=needed,
        resident=resident,
        resident_bytes_per_chip=total,
        traffic_bytes_per_chip=traffic,
        collective_bytes_per_chip=sum(moved.values()),
        collectives=moved,
        estimated_ms=1e3 * cycles / chip.clock,
        model_flops_utilisation_bound=operations / chip.flops / bound if bound else None,
        compile_seconds=seconds,
    ), text


def suggestions(config: RunConfig, mesh: Mesh, name: str) -> list[str]:
    """What may make a program fit, the cheapest change first, as flags."""
    stage, _, kind = name.partition(".")
    found = []
    parts, tensor = sharding.num_parts(mesh), mesh.shape["tensor"]
    if stage == "evaluation" and config.data.eval_batch_size > parts:
        found.append(f"--data.eval_batch_size {config.data.eval_batch_size // 2}")
    if kind.startswith("update"):
        settings = getattr(config, stage)
        at_once = settings.batch_size // parts // settings.portions(parts)
        if at_once > 1:
            found.append(f"--{stage}.per_device_batch_size {at_once // 2}")
        if config.remat != "full":
            found.append("--remat full")
    if config.attention == "xla":
        found.append("--attention auto")
    if mesh.shape["fsdp"] % 2 == 0:
        found.append(
            f"--mesh.data {mesh.shape['data']} --mesh.fsdp {mesh.shape['fsdp'] // 2} "
            f"--mesh.tensor {2 * tensor}"
        )
    if kind in ("rollout", "write"):
        found.append(f"--rollout.max_new_tokens {config.rollout.max_new_tokens // 2}")
    return [*found, "a larger slice"]


def bytes_per_chip(tree: Any) -> int:
    """Of arrays that lie as their shardings say."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _too_much(message: str, limit: float) -> int | None:
    """Bytes that a program would need by the compiler's refusal; None if it refused otherwise."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message
    )
    if not found:
        return int(limit) + 1
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


def _state(stage: programs.Stage, mesh: Mesh, model) -> tuple[Any, Any]:
    """The training state and the frozen parameters as they lie on the mesh."""
    kv_heads = model.config.mllm.num_kv_heads
    return tuple(
        _placed(x, sharding.shardings(x, mesh, kv_heads=kv_heads))
        for x in (jax.eval_shape(stage.create, stage.trained), stage.frozen)
    )


def _by_name(state, frozen) -> dict[str, Any]:
    return {"parameters": state.params, "moments": state.moments, "frozen": frozen}


def _without(tree: Any, part: Any) -> Any:
    """The leaves of `tree` that are not in `part`."""
    paths = {path for path, _ in jax.tree.leaves_with_path(part)}
    return [x for path, x in jax.tree.leaves_with_path(tree) if path not in paths]


def _shape(shape: Sequence[int], dtype: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _placed(tree: Any, places: Any) -> Any:
    """Shapes with their shardings; one for all, or one for each."""
    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda x: _shape(x.shape, x.dtype, places), tree)
    return jax.tree.map(lambda x, place: _shape(x.shape, x.dtype, place), tree, places)
