"""Counting the arithmetic of a program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lens_jax.aot import flops

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
W = jax.ShapeDtypeStruct((8, 8), jnp.float32)
PRODUCT = 2 * 4 * 8 * 8


def test_a_product_and_its_gradient():
    assert flops.count(jnp.dot, X, W) == PRODUCT
    gradient = jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
    # The sum's gradient needs no forward product; both factors need one backward.
    assert flops.count(gradient, X, W) in (2 * PRODUCT, 3 * PRODUCT)


def test_loops_count_as_often_as_they_run():
    def scanned(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert flops.count(scanned, X, W) == 7 * PRODUCT
    assert flops.count(jax.jit(jax.checkpoint(scanned)), X, W) == 7 * PRODUCT

    def looped(x, w):
        return lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    assert flops.count(looped, X, W, while_trips=5) == 5 * PRODUCT
    with pytest.raises(ValueError, match="while_trips"):
        flops.count(looped, X, W)


def test_branches_count_as_the_dearer_one():
    def either(x, w):
        return lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)

    assert flops.count(either, X, W) == 2 * PRODUCT


def test_convolution():
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    w = jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    conv = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.count(conv, x, w) == 2 * (4 * 4 * 5) * (2 * 2 * 3)
