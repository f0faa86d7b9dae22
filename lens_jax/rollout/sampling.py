"""Choosing the next token: temperature, then top-k, then top-p inside the k."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Sampling:
    """Settings of sampling. `top_k` 0 keeps the whole vocabulary, 1 is greedy whatever the rest.

    The temperature, one for all or one for each prompt ([B, 1]), may be traced: another one
    compiles nothing. The rest is part of the program.
    """

    temperature: float | Float[Array, "..."] = 1.0
    top_k: int = struct.field(pytree_node=False, default=0)
    top_p: float = struct.field(pytree_node=False, default=1.0)
    repetition_penalty: float = struct.field(pytree_node=False, default=1.0)


_BLOCK = 128  # of the vocabulary; a TPU's vector is as wide
GREEDY = Sampling(top_k=1)


def row_keys(key: Array, sample_id: Int[Array, "B"], num_completions: int) -> Array:  # keys [B, G]
    """A key for every completion, from its sample and its place in the group alone.

    Devices and processes do not enter: the same completions are sampled on any mesh.
    """
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, sample_id)
    places = jnp.arange(num_completions)
    return jax.vmap(lambda row: jax.vmap(jax.random.fold_in, (None, 0))(row, places))(rows)


def sample(
    logits: Float[Array, "B G V"], keys: Array, index: Int[Array, ""], sampling: Sampling
) -> Int[Array, "B G"]:
    """Samples token `index` of every completion; ties of the greedy choice go to the lower id."""
    if sampling.top_k == 1:
        return top_k(logits, 1)[1][..., 0].astype(jnp.int32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    size = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    gumbel = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, (size,))))
    noise = gumbel(fold(keys, index))
    temperature = jnp.asarray(sampling.temperature)[..., None]
    if size == logits.shape[-1] and sampling.top_p >= 1.0:
        return jnp.argmax(logits / temperature + noise, axis=-1).astype(jnp.int32)
    values, ids = top_k(logits, size)
    scaled = values / temperature
    probs = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    choice = jnp.argmax(scaled + noise, axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, choice, axis=-1)[..., 0].astype(jnp.int32)


def top_k(
    logits: Float[Array, "... V"], k: int
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """`lax.top_k` over the k blocks of the vocabulary with the largest maxima.

    No other block can hold one of the k largest. Sorting some thousands instead of a whole
    vocabulary matters where top-k is a sort, as on TPU.
    """
    size = logits.shape[-1]
    blocks = size // _BLOCK
    if size % _BLOCK or blocks <= 2 * k:
        return lax.top_k(logits, k)
    cut = logits.reshape(*logits.shape[:-1], blocks, _BLOCK)
    _, chosen = lax.top_k(cut.max(-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that ties still go to the lower id
    few = jnp.take_along_axis(cut, chosen[..., None], axis=-2)
    values, places = lax.top_k(few.reshape(*few.shape[:-2], -1), k)
    block = jnp.take_along_axis(chosen, places // _BLOCK, axis=-1)
    return values, block * _BLOCK + places % _BLOCK


def penalize(
    logits: Float[Array, "B G V"], seen: Bool[Array, "B G V"], penalty: float
) -> Float[Array, "B G V"]:
    """Repetition penalty (CTRL, section 4.1): makes tokens that occurred before less likely."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
