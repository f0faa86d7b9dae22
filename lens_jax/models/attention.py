"""Attention over a group's shared prefix followed by each row's own keys.

Every attention over patches or tokens is a special case. A window of the vision tower is a group
member without prefix; the prompt is a group of one; a completion of the group attends to the
prompt's keys, stored once, and to its own. Softmax runs once over both, in float32.
"""

import functools
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float

from lens_jax.models.layers import save

MASKED = -1e30  # finite, so that a row without any key stays finite too


@struct.dataclass
class Prefix:
    """Keys and values of the prompt, one copy for all members of a group."""

    keys: Float[Array, "B K P H"]
    values: Float[Array, "B K P H"]
    mask: Bool[Array, "B P"]


def attention(
    queries: Float[Array, "B G S N H"],
    keys: Float[Array, "B G T K H"],
    values: Float[Array, "B G T K H"],
    mask: Bool[Array, "#B #G #S T"],
    prefix: Prefix | None = None,
    *,
    at_once: int | None = None,
) -> Float[Array, "B G S N H"]:
    """Grouped-query attention to own keys under `mask` and to all of the prefix's valid keys.

    Args:
        at_once: the most scores that live at the same time, for blocks of queries; None: all.
    """
    keys, values = heads_first(keys), heads_first(values)
    return cached_attention(queries, keys, values, mask, prefix, at_once=at_once)


def cached_attention(
    queries: Float[Array, "B G S N H"],
    keys: Float[Array, "B K G T H"],
    values: Float[Array, "B K G T H"],
    mask: Bool[Array, "#B #G #S T"],
    prefix: Prefix | None = None,
    *,
    at_once: int | None = None,
) -> Float[Array, "B G S N H"]:
    """`attention` to keys and values in the layout of caches, heads first.

    Large arrays, and those that every step reads, are then used without a copy.
    """
    b, g, s, n, h = queries.shape
    kv_heads = keys.shape[1]
    queries = (queries * h**-0.5).reshape(b, g, s, kv_heads, n // kv_heads, h)
    sources = [(keys, values, mask[:, None, :, None])]
    if prefix is not None:
        sources.append((prefix.keys, prefix.values, prefix.mask[:, None, None, None, None]))
    width = sum(keys.shape[-2] for keys, *_ in sources)
    blocks = -(-b * g * s * n * width // at_once) if at_once else 1
    out = _attend(min(blocks, s), queries.transpose(0, 3, 1, 4, 2, 5), sources)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, g, s, n, -1)


def heads_first(x: Float[Array, "B ... T K H"]) -> Float[Array, "B K ... T H"]:
    """Keys or values in the layout of caches."""
    return jnp.moveaxis(x, -2, 1)


# Keys, values and mask: each member's own [B, K, G, T, ...], or shared by the group [B, K, T, ...].
_Source = tuple[Float[Array, "B K ... T H"], Float[Array, "B K ... T H"], Bool[Array, "..."]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: int, queries: Float[Array, "B K G R S H"], sources: Sequence[_Source]
) -> Float[Array, "B K G R S H"]:
    """One softmax over the keys of all sources; queries are scaled already.

    Scores live for one of `blocks` of the queries at a time, and the backward pass computes them
    again (FlashAttention, section 3.1): the sum that its softmax subtracts comes from the output.
    """
    return _attend_forward(blocks, queries, sources)[0]


def _attend_forward(blocks, queries, sources):
    def attend(_, block):
        queries, *masks = block
        cut = [(*source[:2], mask) for source, mask in zip(sources, masks, strict=True)]
        scores = [_scores(queries, keys, mask) for keys, _, mask in cut]
        most = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores))
        weights = [jnp.exp(x - most) for x in scores]
        total = sum(x.sum(-1, keepdims=True) for x in weights)
        out = sum(
            _product(x.astype(values.dtype), values, 5, values.ndim - 2, values.ndim - 2)
            for x, (_, values, _) in zip(weights, sources, strict=True)
        )
        return None, ((out / total).astype(queries.dtype), most + jnp.log(total))

    _, (out, log_total) = _scan_blocks(attend, blocks, None, [queries, *_masks(sources)])
    out, log_total = save((out, log_total))
    return out, (queries, sources, out, log_total)


def _attend_backward(blocks, residuals, gradient):
    def attend(so_far, block):
        queries, out, log_total, gradient, *masks = block
        product = gradient.astype(jnp.float32) * out.astype(jnp.float32)
        subtracted = product.sum(-1, keepdims=True)
        of_queries, sums = 0, []
        for (keys, values, _), mask, before in zip(sources, masks, so_far, strict=True):
            token = keys.ndim - 2
            weights = jnp.exp(_scores(queries, keys, mask) - log_total)
            of_weights = _product(gradient, values, 5, token + 1, token)
            of_scores = jnp.where(mask, weights * (of_weights - subtracted), 0).astype(keys.dtype)
            of_queries += _product(of_scores, keys, 5, token, token)
            of_keys = _summed_over_rows(of_scores, queries, token)
            of_values = _summed_over_rows(weights.astype(values.dtype), gradient, token)
            sums.append((before[0] + of_keys, before[1] + of_values))
        return sums, of_queries.astype(queries.dtype)

    queries, sources, out, log_total = residuals
    zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in source[:2]) for source in sources]
    xs = [queries, out, log_total, gradient, *_masks(sources)]
    sums, of_queries = _scan_blocks(attend, blocks, zeros, xs)
    of_sources = [
        (of_keys.astype(keys.dtype), of_values.astype(values.dtype), None)
        for (of_keys, of_values), (keys, values, _) in zip(sums, sources, strict=True)
    ]
    return of_queries, of_sources


_attend.defvjp(_attend_forward, _attend_backward)


def _masks(sources: Sequence[_Source]) -> list[Bool[Array, "..."]]:
    return [mask for *_, mask in sources]


def _scan_blocks(function, blocks, carry, xs):
    """`lax.scan` over blocks of the queries, the last axis but one of `xs` and of the results.

    The first of `xs` is the queries. Masks with one row there are for all queries.
    """
    if blocks == 1:
        return function(carry, xs)
    length = xs[0].shape[-2]
    size = -(-length // blocks)
    blocks = -(-length // size)

    def pad(x):
        more = blocks * size - length if x.shape[-2] > 1 else 0
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

    def step(carry, block):
        def cut(x):
            return lax.dynamic_slice_in_dim(x, block * size, size, -2) if x.shape[-2] > 1 else x

        return function(carry, jax.tree.map(cut, padded))

    def join(x):
        x = jnp.moveaxis(x, 0, -3)
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :length, :]

    padded = jax.tree.map(pad, xs)
    carry, results = lax.scan(step, carry, jnp.arange(blocks))
    return carry, jax.tree.map(join, results)


def _scores(queries, keys, mask) -> Float[Array, "B K G R S T"]:
    token = keys.ndim - 2
    # One factor has to be transposed: the small one.
    if math.prod(queries.shape[token:]) < math.prod(keys.shape[token:]):
        scores = jnp.moveaxis(_product(keys, queries, token + 1, 5, token), token, -1)
    else:
        scores = _product(queries, keys, 5, token + 1, token)
    return jnp.where(mask, scores, MASKED)


def _summed_over_rows(large: Array, small: Array, token: int) -> Float[Array, "... T D"]:
    """`large` [..., S, T] times `small` [..., S, D], summed over the axes of rows, `token` to S."""
    rows = range(token, 5)
    if small.dtype == jnp.float32:
        # The small factor comes first: it is the one that is transposed.
        return _product(small, large, rows, rows, token).swapaxes(-1, -2)
    # XLA folds the swap into the product, and cannot run that one in bfloat16 on a CPU.
    return _product(large, small, rows, rows, token)


def _product(
    lhs: Array, rhs: Array, lhs_axes: int | Sequence[int], rhs_axes: int | Sequence[int], batch: int
) -> Float[Array, "..."]:
    """The product summed over these axes, in float32: [first `batch` axes, rest of lhs and rhs]."""
    contracted = [(x,) if isinstance(x, int) else tuple(x) for x in (lhs_axes, rhs_axes)]
    kept = tuple(range(batch))
    return lax.dot_general(lhs, rhs, (contracted, (kept, kept)), preferred_element_type=jnp.float32)
