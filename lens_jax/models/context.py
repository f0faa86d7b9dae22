"""The context module (LENS, section 3.2): from queries that read the text to a prompt for SAM."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models import layers
from lens_jax.models.attention import attention

_init = nnx.initializers.normal(0.02)


class ConnectorBlock(nnx.Module):
    """Pre-norm full attention over the queries and a quick-GELU MLP."""

    def __init__(self, width: int, num_heads: int, **options: Any):
        self.num_heads = num_heads
        self.norm1 = layers.layer_norm(width, **options)
        self.qkv = layers.linear(width, 3 * width, kernel_init=_init, **options)
        self.proj = layers.linear(width, width, kernel_init=_init, **options)
        self.norm2 = layers.layer_norm(width, **options)
        self.fc1 = layers.linear(width, 4 * width, kernel_init=_init, **options)
        self.fc2 = layers.linear(4 * width, width, kernel_init=_init, **options)

    def __call__(self, x: Float[Array, "B G Q D"]) -> Float[Array, "B G Q D"]:
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3, self.num_heads, -1)
        everywhere = jnp.ones((1, 1, 1, x.shape[-2]), bool)
        attended = attention(*(qkv[..., i, :, :] for i in range(3)), everywhere)
        x = x + self.proj(attended.reshape(x.shape))
        return x + self.fc2(layers.quick_gelu(self.fc1(self.norm2(x))))


class QueryConvolution(nnx.Module):
    """A Conv1d whose kernel spans all queries: it yields one vector."""

    def __init__(self, num_queries: int, width: int, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.dtype = dtype
        self.kernel = nnx.Param(_init(rngs.params(), (num_queries, width, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "B G Q D"]) -> Float[Array, "B G D"]:
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        return x.reshape(*x.shape[:2], -1) @ kernel.reshape(-1, len(bias)) + bias


class Projection(nnx.Module):
    """An MLP to the width of SAM's prompt tokens."""

    def __init__(self, width: int, out: int, **options: Any):
        self.fc1 = layers.linear(width, width, kernel_init=_init, **options)
        self.fc2 = layers.linear(width, out, kernel_init=_init, **options)

    def __call__(self, x: Float[Array, "B G D"]) -> Float[Array, "B G E"]:
        return self.fc2(layers.gelu(self.fc1(x)))


class ContextModule(nnx.Module):
    """Learnable queries, and a connector from their last hidden states to SAM's prompt token."""

    def __init__(
        self,
        num_queries: int,
        width: int,
        prompt_dim: int,
        *,
        depth: int,
        num_heads: int,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
    ):
        self.queries = nnx.Param(_init(rngs.params(), (num_queries, width)))
        self.pos_embed = nnx.Param(jnp.zeros((num_queries, width)))
        self.blocks = layers.stack(
            lambda r: ConnectorBlock(width, num_heads, rngs=r, dtype=dtype), depth, rngs
        )
        self.conv = QueryConvolution(num_queries, width, rngs=rngs, dtype=dtype)
        self.projection = Projection(width, prompt_dim, rngs=rngs, dtype=dtype)

    def __call__(self, hidden: Float[Array, "B G Q D"]) -> Float[Array, "B G E"]:
        """The prompt token for SAM from the queries' hidden states after the final norm."""
        x = hidden + self.pos_embed[...].astype(hidden.dtype)
        x, _ = layers.scan(self.blocks, lambda block, x: (block(x), None), x)
        return self.projection(self.conv(x))
