"""Attention with a shared prefix against dense attention over whole sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models.attention import Prefix, attention, heads_first
from tests import micro

B, G, P, S, H = 2, 3, 7, 5, 4


def inputs(heads, kv_heads):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal((*shape, H)).astype(np.float32)  # noqa: E731
    arrays = {
        "queries": normal(B, G, S, heads),
        "keys": normal(B, G, S, kv_heads),
        "values": normal(B, G, S, kv_heads),
        "prefix_keys": normal(B, P, kv_heads),
        "prefix_values": normal(B, P, kv_heads),
    }
    mask = np.tri(S, dtype=bool) & (rng.random((B, G, 1, S)) < 0.7)
    return arrays, mask, np.arange(P) < np.array([[4], [7]])


def prefix_of(arrays, mask) -> Prefix:
    return Prefix(heads_first(arrays["prefix_keys"]), heads_first(arrays["prefix_values"]), mask)


def shared(arrays, mask, prefix_mask):
    prefix = prefix_of(arrays, prefix_mask)
    prefix = Prefix(
        *map(heads_first, (arrays["prefix_keys"], arrays["prefix_values"])), prefix_mask
    )
    return attention(arrays["queries"], arrays["keys"], arrays["values"], mask, prefix)


def dense(arrays, mask, prefix_mask):
    """One softmax over the sequence [prefix | own] of every member, heads repeated."""
    join = lambda own, prefix: jnp.concatenate(  # noqa: E731
        [jnp.repeat(prefix[:, None], G, axis=1), own], axis=2
    )
    repeats = arrays["queries"].shape[3] // arrays["keys"].shape[3]
    keys = jnp.repeat(join(arrays["keys"], arrays["prefix_keys"]), repeats, axis=3)
    values = jnp.repeat(join(arrays["values"], arrays["prefix_values"]), repeats, axis=3)
    seen = np.broadcast_to(prefix_mask[:, None, None], (B, G, S, P))
    seen = np.concatenate([seen, mask], axis=-1)
    scores = jnp.einsum("bgsnh,bgtnh->bgnst", arrays["queries"], keys) / H**0.5
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf))
    return jnp.einsum("bgnst,bgtnh->bgsnh", weights, values)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_shared_prefix(heads, kv_heads):
    arrays, mask, prefix_mask = inputs(heads, kv_heads)
    weights = np.random.default_rng(1).standard_normal((B, G, S, heads, H)).astype(np.float32)

    def run(function):
        def weighted(arrays):
            out = function(arrays, mask, prefix_mask)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(weighted, has_aux=True))(arrays)

    (ours, out), (expected, expected_out) = run(shared), run(dense)
    micro.close(out, expected_out, 3e-6)
    micro.same_gradients(ours, expected, 3e-6)


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_blocks_of_queries(queries):
    """At most so many of 5, the last block padded; `rows` is a mask of one row for all."""
    arrays, mask, prefix_mask = inputs(4, 2)
    rows = np.ones((B, G, 1, S), bool)

    def run(at_once):
        def total(arrays):
            prefix = prefix_of(arrays, prefix_mask)
            x = [arrays[name] for name in ("queries", "keys", "values")]
            out = [attention(*x, m, prefix, at_once=at_once) for m in (mask, rows)]
            return sum((y**2).sum() for y in out), out

        return jax.jit(jax.grad(total, has_aux=True))

    at_once = B * G * queries * 4 * (S + P)
    (ours, out), (expected, expected_out) = run(at_once)(arrays), run(None)(arrays)
    for x, y in zip(out, expected_out, strict=True):
        micro.close(x, y, 3e-6)
    micro.same_gradients(ours, expected, 3e-6)
    blocks = jax.make_jaxpr(run(at_once))(arrays)
    assert f"{B},2,{G},2,{-(-S // -(-S // queries))},{P}]" in str(blocks)
    assert f"{B},2,{G},2,{S},{P}]" not in str(blocks)


def test_members_of_a_group_do_not_see_each_other():
    arrays, mask, prefix_mask = inputs(4, 2)
    run = jax.jit(shared)
    before = run(arrays, mask, prefix_mask)
    for name in ("keys", "values", "queries"):
        arrays[name][:, 1] = 100.0
    after = run(arrays, mask, prefix_mask)
    np.testing.assert_array_equal(before[:, [0, 2]], after[:, [0, 2]])


def test_no_key_at_all_is_finite():
    """Windows of nothing but padding exist; neither they nor their gradients may spread NaN."""
    arrays, mask, prefix_mask = inputs(4, 2)
    nothing = jnp.zeros_like(mask)

    def total(arrays, prefix):
        return attention(arrays["queries"], arrays["keys"], arrays["values"], nothing, prefix).sum()

    for prefix in (
        None,
        Prefix(
            *map(heads_first, (arrays["prefix_keys"], arrays["prefix_values"])), prefix_mask & 0
        ),
    ):
        value, gradients = jax.jit(jax.value_and_grad(total))(arrays, prefix)
        assert all(jnp.isfinite(x).all() for x in (value, *jax.tree.leaves(gradients)))
