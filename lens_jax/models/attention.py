"""The one attention of the house: own keys, after the keys of a prefix shared by the group.

Every attention over patches or tokens is a special case. A window of the vision tower is a group
member without prefix; the prompt is a group of one; a completion of the group attends to the
prompt's keys, stored once, and to its own. Softmax runs once over both, in float32.

Long sequences, packed groups and whole pictures, go through `Attention`, which leaves them to the
accelerator's own kernel where there is one.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from lens_jax.models import kernels
from lens_jax.models.layers import save

MASKED = -1e30  # finite, so that a row without any key stays finite too
LONG = 2**21  # scores of long sequences that XLA holds at a time: 8 MiB, which caches keep

Kernel = Literal["xla", "splash", "cudnn"]


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
        at_once: the most scores that are to live at the same time, for blocks of queries; None: all
            of them.
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
    """`attention` to keys and values that lie as caches keep them, heads first.

    Whatever is as large as the scores, or read at every step, is then used as it lies.
    """
    b, g, s, n, h = queries.shape
    kv_heads = keys.shape[1]
    queries = (queries * h**-0.5).reshape(b, g, s, kv_heads, n // kv_heads, h)
    parts = [(keys, values, mask[:, None, :, None])]
    if prefix is not None:
        parts.append((prefix.keys, prefix.values, prefix.mask[:, None, None, None, None]))
    width = sum(keys.shape[-2] for keys, *_ in parts)
    blocks = -(-b * g * s * n * width // at_once) if at_once else 1
    out = _attend(min(blocks, s), queries.transpose(0, 3, 1, 4, 2, 5), parts)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(b, g, s, n, -1)


def heads_first(x: Float[Array, "B ... T K H"]) -> Float[Array, "B K ... T H"]:
    """Keys or values as caches keep them."""
    return jnp.moveaxis(x, -2, 1)


# Keys, values and mask: of the group's members [B, K, G, T, ...], or shared by them [B, K, T, ...].
_Part = tuple[Float[Array, "B K ... T H"], Float[Array, "B K ... T H"], Bool[Array, "..."]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    blocks: int, queries: Float[Array, "B K G R S H"], parts: Sequence[_Part]
) -> Float[Array, "B K G R S H"]:
    """One softmax over the keys of all parts; queries are scaled already.

    Scores live for one of `blocks` of the queries at a time, and the backward pass computes them
    again (FlashAttention, section 3.1): what its softmax subtracts comes from the output.
    """
    return _attend_forward(blocks, queries, parts)[0]


def _attend_forward(blocks, queries, parts):
    def attend(_, block):
        queries, *masks = block
        cut = [(*part[:2], mask) for part, mask in zip(parts, masks, strict=True)]
        scores = [_scores(queries, keys, mask) for keys, _, mask in cut]
        most = functools.reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in scores))
        weights = [jnp.exp(x - most) for x in scores]
        total = sum(x.sum(-1, keepdims=True) for x in weights)
        out = sum(
            _product(x.astype(values.dtype), values, 5, values.ndim - 2, values.ndim - 2)
            for x, (_, values, _) in zip(weights, parts, strict=True)
        )
        return None, ((out / total).astype(queries.dtype), most + jnp.log(total))

    _, (out, log_total) = _scan_blocks(attend, blocks, None, [queries, *_masks(parts)])
    out, log_total = save((out, log_total))
    return out, (queries, parts, out, log_total)


def _attend_backward(blocks, residuals, gradient):
    def attend(so_far, block):
        queries, out, log_total, gradient, *masks = block
        product = gradient.astype(jnp.float32) * out.astype(jnp.float32)
        subtracted = product.sum(-1, keepdims=True)
        of_queries, sums = 0, []
        for (keys, values, _), mask, before in zip(parts, masks, so_far, strict=True):
            token = keys.ndim - 2
            weights = jnp.exp(_scores(queries, keys, mask) - log_total)
            of_weights = _product(gradient, values, 5, token + 1, token)
            of_scores = jnp.where(mask, weights * (of_weights - subtracted), 0).astype(keys.dtype)
            of_queries += _product(of_scores, keys, 5, token, token)
            # The small factor first: it is the one that is turned.
            rows = range(token, 5)
            of_keys, of_values = (
                _product(small, large, rows, rows, token).swapaxes(-1, -2)
                for small, large in ((queries, of_scores), (gradient, weights.astype(values.dtype)))
            )
            sums.append((before[0] + of_keys, before[1] + of_values))
        return sums, of_queries.astype(queries.dtype)

    queries, parts, out, log_total = residuals
    zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in part[:2]) for part in parts]
    xs = [queries, out, log_total, gradient, *_masks(parts)]
    sums, of_queries = _scan_blocks(attend, blocks, zeros, xs)
    of_parts = [
        (of_keys.astype(keys.dtype), of_values.astype(values.dtype), None)
        for (of_keys, of_values), (keys, values, _) in zip(sums, parts, strict=True)
    ]
    return of_queries, of_parts


_attend.defvjp(_attend_forward, _attend_backward)


def _masks(parts: Sequence[_Part]) -> list[Bool[Array, "..."]]:
    return [mask for *_, mask in parts]


def _scan_blocks(function, blocks, carry, xs):
    """`lax.scan` over blocks of the queries, the last axis but one of `xs` and of the results.

    Masks of one row there are for all queries. The first of `xs` is the queries.
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
    # One factor has to be turned: the small one.
    if math.prod(queries.shape[token:]) < math.prod(keys.shape[token:]):
        scores = jnp.moveaxis(_product(keys, queries, token + 1, 5, token), token, -1)
    else:
        scores = _product(queries, keys, 5, token + 1, token)
    return jnp.where(mask, scores, MASKED)


def _product(
    lhs: Array, rhs: Array, lhs_axes: int | Sequence[int], rhs_axes: int | Sequence[int], batch: int
) -> Float[Array, "..."]:
    """Sum over these axes, the first `batch` ones kept apart: float32 [batch, of lhs, of rhs]."""
    contracted = [(x,) if isinstance(x, int) else tuple(x) for x in (lhs_axes, rhs_axes)]
    kept = tuple(range(batch))
    return lax.dot_general(lhs, rhs, (contracted, (kept, kept)), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of long sequences by one kernel: part of a model's definition.

    The compiler does not cut splash for several devices: with a `mesh`, kernels other than XLA's
    run on each device's rows and, where they divide, heads.
    """

    kernel: Kernel = "xla"
    mesh: Mesh | None = None

    @classmethod
    def choose(
        cls,
        wanted: str,
        mesh: Mesh | None,
        *,
        dtype,
        head_dims: tuple[int, ...],
    ) -> "Attention":
        """The kernel of that name; `auto`: splash on TPU, cuDNN where it can be, else XLA.

        Args:
            mesh: the devices; None: the default one alone.
            dtype: of all queries, keys and values to come.
            head_dims: of these as well.

        Raises:
            ValueError: the named kernel does not run there, and why.
        """
        device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
        refusals = {
            "splash": kernels.splash_refusal(device),
            "cudnn": kernels.cudnn_refusal(device, dtype, head_dims),
            "xla": None,
        }
        if wanted == "auto":
            wanted = next(name for name, refusal in refusals.items() if refusal is None)
        elif refusals[wanted]:
            raise ValueError(f"attention: {wanted} {refusals[wanted]}; use auto or xla")
        return cls(wanted, mesh)

    def packed(
        self,
        queries: Float[Array, "B L N H"],
        keys: Float[Array, "B L K H"],
        values: Float[Array, "B L K H"],
        valid: Bool[Array, "B L"],
        *,
        prompt: int,
        group: int,
    ) -> Float[Array, "B L N H"]:
        """Sequences `[prompt | own_1 | … | own_G]`: P = `prompt` tokens, G = `group` equal parts.

        A token sees the valid ones of the prompt and of its own part, up to itself. The first token
        of every prompt must be valid. What a token that is not valid gets is arbitrary, but finite.
        """
        function = {"xla": _packed, "splash": kernels.splash, "cudnn": _packed_cudnn}[self.kernel]
        function = partial(function, prompt=prompt, group=group)
        return self._run(function, queries, keys, values, valid)

    def full(
        self,
        queries: Float[Array, "B L N H"],
        keys: Float[Array, "B L K H"],
        values: Float[Array, "B L K H"],
        valid: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L N H"]:
        """All see all that is valid; None: everything is."""
        if valid is None:
            valid = jnp.ones(queries.shape[:2], bool)
        function = {"xla": _full, "splash": kernels.splash, "cudnn": _full_cudnn}[self.kernel]
        return self._run(function, queries, keys, values, valid)

    def _run(self, function, queries, keys, values, valid):
        if self.kernel != "xla":
            function = kernels.per_device(function, self.mesh, kv_heads=keys.shape[2])
        return function(queries, keys, values, valid)


XLA = Attention()


def _full(queries, keys, values, valid):
    return _alone(queries, keys, values, valid[:, None, None])


def _full_cudnn(queries, keys, values, valid):
    b, length = valid.shape
    mask = jnp.broadcast_to(valid[:, None], (b, length, length))
    return kernels.cudnn(queries, keys, values, mask)


def _packed(queries, keys, values, valid, *, prompt, group):
    """The prompt by itself, then its completions behind it: no masked-out block is computed."""
    (valid, own_valid), *parts = (_apart(x, prompt, group) for x in (valid, queries, keys, values))
    prompt_parts, own_parts = zip(*parts, strict=True)
    attended = _alone(*prompt_parts, _causal(valid)[:, None])
    if not group:
        return attended
    prefix = Prefix(*map(heads_first, prompt_parts[1:]), valid)
    seen = attention(*own_parts, _causal(own_valid), prefix, at_once=LONG)
    return _together(attended, seen)


def _packed_cudnn(queries, keys, values, valid, *, prompt, group):
    """As `_packed`, with a copy of the prompt's few KV heads before each completion's own.

    The copies are small; one call for the whole sequence would compute 2.5 times the scores at
    430 + 8 * 104 tokens, 4 times at 430 + 8 * 320.
    """
    (valid, own_valid), *parts = (_apart(x, prompt, group) for x in (valid, queries, keys, values))
    prompt_parts, own_parts = zip(*parts, strict=True)
    attended = kernels.cudnn(*prompt_parts, _causal(valid))
    if not group:
        return attended
    b, g, s = own_valid.shape
    flat = lambda x: x.reshape(b * g, *x.shape[2:])  # noqa: E731

    def behind(shared, own):
        shared = jnp.broadcast_to(shared[:, None], (b, g, *shared.shape[1:]))
        return flat(jnp.concatenate([shared, own], axis=2))

    before = jnp.broadcast_to(valid[:, None, None], (b, g, s, prompt))
    mask = flat(jnp.concatenate([before, _causal(own_valid)], axis=-1))
    keys, values = map(behind, prompt_parts[1:], own_parts[1:])
    seen = kernels.cudnn(flat(own_parts[0]), keys, values, mask)
    return _together(attended, seen.reshape(own_parts[0].shape))


def _alone(queries, keys, values, mask):
    """Sequences [B, L, ...] to themselves: groups of one."""
    return attention(queries[:, None], keys[:, None], values[:, None], mask, at_once=LONG)[:, 0]


def _causal(valid: Bool[Array, "... L"]) -> Bool[Array, "... L L"]:
    return jnp.tri(valid.shape[-1], dtype=bool) & valid[..., None, :]


def _apart(x: Array, prompt: int, group: int) -> tuple[Array, Array | None]:
    """[B, P + G * S, ...] -> [B, P, ...], [B, G, S, ...]; None if there is no group."""
    own = x[:, prompt:].reshape(len(x), group, -1, *x.shape[2:]) if group else None
    return x[:, :prompt], own


def _together(attended: Float[Array, "B P N H"], seen: Float[Array, "B G S N H"]) -> Array:
    return jnp.concatenate([attended, seen.reshape(len(seen), -1, *seen.shape[3:])], axis=1)
