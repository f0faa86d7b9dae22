"""Log-probabilities and entropies of tokens without ever holding the logits.

A scan over blocks of the vocabulary keeps a running maximum and sums, as flash attention does; the
backward pass computes each block's logits again. Alive at any time: [N, V / blocks].
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

MAX_BLOCKS = 8


def logits(hidden: Float[Array, "... D"], head: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """All logits in float32, for decoding."""
    return jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def token_log_probs(
    hidden: Float[Array, "... D"], head: Float[Array, "V D"], tokens: Int[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Log-softmax of the raw logits at `tokens`, and the distribution's entropy; float32, nats."""
    shape = tokens.shape
    log_probs, entropy = _log_probs(
        hidden.reshape(-1, hidden.shape[-1]), head.astype(hidden.dtype), tokens.reshape(-1)
    )
    return log_probs.reshape(shape), entropy.reshape(shape)


def _blocks(vocabulary: int) -> int:
    return max(n for n in range(1, MAX_BLOCKS + 1) if vocabulary % n == 0)


def _block_logits(hidden, head, index, width):
    block = lax.dynamic_slice_in_dim(head, index * width, width)
    return block, jnp.einsum("nd,vd->nv", hidden, block, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _log_probs(hidden, head, tokens):
    return _forward(hidden, head, tokens)[0]


def _forward(hidden, head, tokens):
    blocks = _blocks(head.shape[0])
    width = head.shape[0] // blocks

    def body(carry, index):
        peak, total, weighted, taken = carry
        _, z = _block_logits(hidden, head, index, width)
        higher = jnp.maximum(peak, z.max(-1))
        weights = jnp.exp(z - higher[:, None])
        shrink = jnp.exp(peak - higher)
        local = tokens - index * width
        inside = (local >= 0) & (local < width)
        here = jnp.take_along_axis(z, jnp.clip(local, 0, width - 1)[:, None], axis=1)[:, 0]
        return (
            higher,
            total * shrink + weights.sum(-1),
            weighted * shrink + (weights * z).sum(-1),
            jnp.where(inside, here, taken),
        ), None

    zeros = jnp.zeros(hidden.shape[:1], jnp.float32)
    start = (zeros - jnp.inf, zeros, zeros, zeros)
    (peak, total, weighted, taken), _ = lax.scan(body, start, jnp.arange(blocks))
    log_total = peak + jnp.log(total)
    entropy = log_total - weighted / total
    return (taken - log_total, entropy), (hidden, head, tokens, log_total, entropy)


def _backward(saved, gradients):
    hidden, head, tokens, log_total, entropy = saved
    on_log_prob, on_entropy = (g[:, None] for g in gradients)
    blocks = _blocks(head.shape[0])
    width = head.shape[0] // blocks

    def body(on_hidden, index):
        block, z = _block_logits(hidden, head, index, width)
        log_probs = z - log_total[:, None]
        probs = jnp.exp(log_probs)
        taken = (jnp.arange(width) + index * width) == tokens[:, None]
        # d log p(token) / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
        on_z = on_log_prob * (taken - probs) - on_entropy * probs * (log_probs + entropy[:, None])
        on_z = on_z.astype(hidden.dtype)
        on_hidden += jnp.einsum("nv,vd->nd", on_z, block, preferred_element_type=jnp.float32)
        on_block = jnp.einsum("nv,nd->vd", on_z, hidden, preferred_element_type=jnp.float32)
        return on_hidden, on_block.astype(head.dtype)

    start = jnp.zeros(hidden.shape, jnp.float32)
    on_hidden, on_head = lax.scan(body, start, jnp.arange(blocks))
    return on_hidden.astype(hidden.dtype), on_head.reshape(head.shape), None


_log_probs.defvjp(_forward, _backward)
