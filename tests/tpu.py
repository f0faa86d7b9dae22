"""TPUs that are not there: XLA's compiler for them runs wherever libtpu is installed."""

import os

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

# libtpu reads these when it is loaded: nothing to ask about, and not the only process.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def devices(topology: str = "v5e:2x2", slices: int = 1) -> list[jax.Device]:
    """The chips of some slices. Skips the test that calls it where libtpu is missing."""
    pytest.importorskip("libtpu", reason="libtpu, which holds the compiler, is not installed")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def compile_for_one(function, *arguments, topology: str = "v5e:2x2"):
    """`function`, compiled for one chip of a slice; arguments are shapes or arrays.

    Skips the test that calls it where libtpu is missing.
    """
    place = SingleDeviceSharding(devices(topology)[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    return jax.jit(function).lower(*shapes).compile()
