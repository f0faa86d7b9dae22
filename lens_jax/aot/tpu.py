"""TPUs that are not there: XLA's compiler for them runs wherever libtpu is installed.

libtpu takes over the signal handlers of the process that loads it: compile in one that does
nothing else.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

# libtpu reads these when it is loaded: nothing to ask about, and not the only process.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


# Where Linux shows TPUs: /dev/accel0 of older drivers, /dev/vfio/0 of newer ones.
DEVICES = ("accel*", "vfio/[0-9]*")


def pass_over_if_absent() -> None:
    """Keeps JAX from loading libtpu where there is no TPU, before it looks for devices.

    It would take over signal handlers and warn that it cannot find hosts. Nothing changes where
    anything speaks for a TPU, or where the platform has been chosen.
    """
    import jax

    told = [name for name in os.environ if name.startswith(("TPU_", "JAX_FORCE_TPU"))]
    told = set(told) - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # JAX and libtpu set these
    if jax.config.jax_platforms or told or any(any(Path("/dev").glob(x)) for x in DEVICES):
        return
    if importlib.util.find_spec("libtpu") is None:
        return
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    )
    if not plugins:
        jax.config.update("jax_platforms", "cpu")
        return
    # Only JAX knows which of the others runs here. libtpu is loaded, and has nothing to ask about.
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class TopologyError(Exception):
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
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        options = {"num_slices": slices} if slices > 1 else {}
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except Exception as error:  # libtpu raises several kinds
        first = str(error).splitlines()[0]
        raise TopologyError(f"{topology}: libtpu refuses it: {first}") from error
