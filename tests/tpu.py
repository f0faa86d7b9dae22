"""TPUs that are not there, for tests that compile for them."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from lens_jax.aot import tpu


def devices(topology: str = "v5e:2x2", slices: int = 1) -> list[jax.Device]:
    """The chips of some slices. Skips the test that calls it where libtpu is missing."""
    pytest.importorskip("libtpu", reason="libtpu, which holds the compiler, is not installed")
    return tpu.devices(topology, slices)


def compile_for_one(function, *arguments, topology: str = "v5e:2x2"):
    """`function`, compiled for one chip of a slice; arguments are shapes or arrays.

    Skips the test that calls it where libtpu is missing.
    """
    place = SingleDeviceSharding(devices(topology)[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    return jax.jit(function).lower(*shapes).compile()
