"""Counting compilations."""

import jax
import jax.numpy as jnp

from lens_jax.training.compilations import Compilations


def test_each_shape_counts_once():
    def doubled(x):
        return 2 * x

    program = jax.jit(doubled)
    arguments = [jax.device_put(jnp.ones(n)) for n in (3, 4)]
    with Compilations() as compilations:
        for x in arguments * 3:
            program(x)
        assert compilations.count == 2
        assert str(compilations).startswith("2 programs")
        jax.clear_caches()
        program(arguments[0])
    assert [n for name, n in compilations.by_name.items() if "doubled" in name] == [3]
    count = compilations.count
    jax.jit(doubled)(jnp.ones(5))
    assert compilations.count == count
