"""TPUs that are not there: XLA's compiler for them runs wherever libtpu is installed.

libtpu takes over the signal handlers of the process that loads it: compile in one that does
nothing else.
"""

import dataclasses
import importlib.util
import re

from lens_jax import libtpu
from lens_jax.flags import UsageError


class TopologyError(UsageError):
    """A slice that cannot be compiled for; the text says why."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, by its makers' numbers: bytes, and per second FLOPs (bfloat16), cycles, bytes.

    `memory` is what the compiler grants a program: its own share is taken off.
    """

    memory: float
    flops: float
    clock: float
    bandwidth: float
    interconnect: float


_GIB = 2**30
CHIPS = {
    "v5e": Chip(15.75 * _GIB, 197e12, 1.5e9, 819e9, 200e9),
    "v5p": Chip(95.74 * _GIB, 459e12, 1.75e9, 2765e9, 600e9),
    "v6e": Chip(31.25 * _GIB, 918e12, 1.75e9, 1640e9, 448e9),
}
# Slices as they are rented, small to large.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}


def chip(topology: str) -> Chip:
    """The chips of a slice such as v5e:4x4. Raises TopologyError."""
    found = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
    if not found or found[1] not in CHIPS:
        raise TopologyError(
            f"{topology} is no slice: give a chip ({', '.join(CHIPS)}) and its grid, as v5e:4x4 "
            "or v5p:2x2x4"
        )
    return CHIPS[found[1]]


def devices(topology: str, slices: int = 1):
    """The devices of some slices, to build a mesh of: JAX compiles for them, and runs nothing.

    Raises:
        TopologyError: libtpu is missing, or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            "libtpu, which holds XLA's compiler for TPU, is not installed: "
            "pip install libtpu (Linux on x86-64)"
        )
    libtpu.be_alone()
    from jax.experimental import topologies

    try:
        options = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except Exception as error:  # libtpu raises several kinds
        first = str(error).splitlines()[0]
        raise TopologyError(f"{topology}: libtpu refuses it: {first}") from error
