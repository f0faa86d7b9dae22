"""The one attention of the house: own keys, after the keys of a prefix shared by the group.

Every attention over patches or tokens is a special case. A window of the vision tower is a group
member without prefix; the prompt is a group of one; a completion of the group attends to the
prompt's keys, stored once, and to its own. Softmax runs once over both, in float32.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

MASKED = -1e30  # finite, so that a row without any key stays finite too


@struct.dataclass
class Prefix:
    """Keys and values of the prompt, one copy for all members of a group."""

    keys: Float[Array, "B P K H"]
    values: Float[Array, "B P K H"]
    mask: Bool[Array, "B P"]


def attention(
    queries: Float[Array, "B G S N H"],
    keys: Float[Array, "B G T K H"],
    values: Float[Array, "B G T K H"],
    mask: Bool[Array, "#B #G #S T"],
    prefix: Prefix | None = None,
) -> Float[Array, "B G S N H"]:
    """Grouped-query attention to own keys under `mask` and to all of the prefix's valid keys."""
    b, g, s, n, h = queries.shape
    kv_heads = keys.shape[3]
    queries = (queries * h**-0.5).reshape(b, g, s, kv_heads, n // kv_heads, h)
    own = jnp.einsum("bgskrh,bgtkh->bgkrst", queries, keys, preferred_element_type=jnp.float32)
    own = jnp.where(mask[:, :, None, None], own, MASKED)
    if prefix is None:
        weights = jax.nn.softmax(own).astype(values.dtype)
        out = jnp.einsum("bgkrst,bgtkh->bgskrh", weights, values)
        return out.reshape(b, g, s, n, -1)
    shared = jnp.einsum(
        "bgskrh,bpkh->bgkrsp", queries, prefix.keys, preferred_element_type=jnp.float32
    )
    shared = jnp.where(prefix.mask[:, None, None, None, None], shared, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1)).astype(values.dtype)
    split = prefix.keys.shape[1]
    out = jnp.einsum("bgkrsp,bpkh->bgskrh", weights[..., :split], prefix.values)
    out += jnp.einsum("bgkrst,bgtkh->bgskrh", weights[..., split:], values)
    return out.reshape(b, g, s, n, -1)
