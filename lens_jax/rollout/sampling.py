"""Choosing the next token: temperature, then top-k, then top-p inside the k."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw. `top_k` 0 keeps the whole vocabulary, 1 is greedy whatever the rest says."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Sampling(top_k=1)


def row_keys(key: Array, sample_id: Int[Array, "B"], num_completions: int) -> Array:  # keys [B, G]
    """A key for every completion, from its sample and its place in the group alone.

    Nothing about devices or processes enters: the same completions are drawn on any mesh.
    """
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, sample_id)
    places = jnp.arange(num_completions)
    return jax.vmap(lambda row: jax.vmap(jax.random.fold_in, (None, 0))(row, places))(rows)


def sample(
    logits: Float[Array, "B G V"], keys: Array, index: Int[Array, ""], sampling: Sampling
) -> Int[Array, "B G"]:
    """Draws token `index` of every completion; ties of the greedy choice go to the lower id."""
    if sampling.top_k == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    size = logits.shape[-1]
    values, ids = lax.top_k(logits, min(sampling.top_k or size, size))
    scaled = values / sampling.temperature
    probs = jax.nn.softmax(scaled, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    scaled = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    draw = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, scaled.shape[-1:])))
    choice = jnp.argmax(scaled + draw(fold(keys, index)), axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, choice, axis=-1)[..., 0].astype(jnp.int32)


def penalize(
    logits: Float[Array, "B G V"], seen: Bool[Array, "B G V"], penalty: float
) -> Float[Array, "B G V"]:
    """Repetition penalty (CTRL, section 4.1): makes tokens that occurred before less likely."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
