"""Memory and work of a program on a slice of TPUs that is not there.

It is compiled from shapes for the slice's devices. Added to what it needs by itself is what else
lies on a chip while it runs.
"""

import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lens_jax.aot import flops, hlo, tpu
from lens_jax.aot.run_programs import Program
from lens_jax.aot.shapes import bytes_per_chip
from lens_jax.config import RunConfig, batch_rows, check_batches
from lens_jax.distribution import sharding


def make_mesh(topology: str, config: RunConfig, slices: int = 1) -> Mesh:
    """The mesh that a run makes of a slice, or of several alike.

    Raises:
        TopologyError: there is no such slice.
        ConfigError: the run does not divide over it.
    """
    mesh = sharding.make_mesh(config.mesh, tpu.devices(topology, slices), rows=batch_rows(config))
    check_batches(config, mesh.shape["data"], mesh.shape["fsdp"])
    return mesh


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report on a program; bytes, FLOPs and milliseconds are those of one chip."""

    name: str
    fits: bool
    hbm_bytes_per_chip: int
    """Arguments, results, temporaries and code of the program alone, at its peak."""
    hbm_limit: int
    resident: dict[str, int]
    """Bytes of all that lies on the chip while the program runs, by what it is."""
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
    resident["caches"] = program.caches
    arguments = sum(named.values())  # that the program itself holds

    def report(needed: int, **facts: Any) -> Compiled:
        total = sum(resident.values())
        return Compiled(
            name=program.name,
            fits=total <= chip.memory and "error" not in facts,
            hbm_bytes_per_chip=needed,
            hbm_limit=int(chip.memory),
            resident=resident,
            resident_bytes_per_chip=total,
            flops_per_chip=operations,
            **facts,
        )

    if sum(resident.values()) > chip.memory and not hopeless:
        error = "even without temporaries: not compiled"
        return report(arguments + program.caches, error=error), None
    begin = time.perf_counter()
    lowered = program.function.lower(*program.arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (needed := _too_much(str(error), chip.memory)) is None:
            raise
        seconds = time.perf_counter() - begin
        resident["temporaries"] = max(0, needed - arguments - program.caches)
        return report(needed, compile_seconds=seconds, error=str(error).splitlines()[0]), None
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    resident["code"] = memory.generated_code_size_in_bytes
    # Not its sum of parts: libtpu's size of temporaries counts holes between them as well.
    needed = memory.peak_memory_in_bytes + resident["code"]
    # The compiler pads arguments: what they take beyond their elements counts as temporary.
    resident["temporaries"] = needed - arguments - program.caches - resident["code"]
    text = compiled.as_text()
    module, trips = hlo.Module(text), program.while_trips or 1
    moved = module.collective_bytes(unknown_trips=trips)
    traffic = module.traffic(unknown_trips=trips)
    cycles = module.cycles(unknown_trips=trips)
    bound = max(
        cycles / chip.clock,
        operations / chip.flops,
        traffic / chip.bandwidth,
        sum(moved.values()) / chip.interconnect,
    )
    return report(
        needed,
        traffic_bytes_per_chip=traffic,
        collective_bytes_per_chip=sum(moved.values()),
        collectives=moved,
        estimated_ms=1e3 * cycles / chip.clock,
        model_flops_utilisation_bound=operations / chip.flops / bound if bound else None,
        compile_seconds=seconds,
    ), text


def suggestions(config: RunConfig, mesh: Mesh, name: str) -> list[str]:
    """Flags that may make a program fit, the cheapest change first."""
    stage, _, kind = name.partition(".")
    found = []
    parts, tensor = sharding.num_parts(mesh), mesh.shape["tensor"]
    if stage == "evaluation" and config.data.eval_batch_size > parts:
        found.append(f"--data.eval_batch_size {config.data.eval_batch_size // 2}")
    if kind.startswith("update"):
        settings = getattr(config, stage)
        at_once = settings.batch_size // parts // settings.micro_batches(parts)
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
