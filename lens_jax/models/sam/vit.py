"""SAM 1's image encoder: a plain ViT, most of whose blocks attend in windows.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (2022), with the
decomposed relative positions of "MViTv2" (Li et al., 2022).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models import layers
from lens_jax.models.sam.config import PATCH, SamConfig
from lens_jax.models.sam.hiera import from_windows, to_windows
from lens_jax.models.sam.layers import Mlp


class VitPatchEmbed(nnx.Module):
    """A 16x16 convolution with stride 16."""

    def __init__(self, dim: int, **options: Any):
        self.proj = nnx.Conv(3, dim, (PATCH, PATCH), strides=PATCH, padding=0, **options)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H//16 W//16 C"]:
        return self.proj(images)


class RelativeAttention(nnx.Module):
    """Self-attention over square maps, with learned relative positions.

    Every score gains the query's products with two embeddings, of the distance in rows and of the
    distance in columns. Distances go from -(side - 1) to side - 1, from query to key.
    """

    def __init__(self, dim: int, heads: int, side: int, **options: Any):
        self.heads, self.side = heads, side
        self.qkv = layers.linear(dim, 3 * dim, **options)
        self.proj = layers.linear(dim, dim, **options)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * side - 1, dim // heads)))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * side - 1, dim // heads)))

    def position_bias(self, q: Float[Array, "N S*S heads D"]) -> Float[Array, "N heads S*S S*S"]:
        """The scores' bias from relative positions, float32."""
        side = self.side
        q = q.reshape(-1, side, side, *q.shape[2:])
        distance = np.arange(side)[:, None] - np.arange(side) + side - 1
        rows, columns = (x[...].astype(q.dtype)[distance] for x in (self.rel_pos_h, self.rel_pos_w))
        rows = jnp.einsum("nhwad,hkd->nahwk", q, rows, preferred_element_type=jnp.float32)
        columns = jnp.einsum("nhwad,wkd->nahwk", q, columns, preferred_element_type=jnp.float32)
        bias = rows[..., :, None] + columns[..., None, :]
        return bias.reshape(*bias.shape[:2], side**2, side**2)

    def __call__(self, x: Float[Array, "N S S C"]) -> Float[Array, "N S S C"]:
        batch, _, _, channels = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (y.reshape(batch, -1, self.heads, channels // self.heads) for y in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, bias=self.position_bias(q))
        return self.proj(out.reshape(x.shape))


class Block(nnx.Module):
    """A pre-norm transformer block, in windows of `window` cells unless that is 0.

    Windows at the right and the bottom may reach beyond the map: the zeros there are attended to.
    """

    def __init__(self, config: SamConfig, window: int, **options: Any):
        self.window, dim = window, config.embed_dim
        side = window or config.embedding_size
        self.norm1 = layers.layer_norm(dim, **options)
        self.attn = RelativeAttention(dim, config.num_heads, side, **options)
        self.norm2 = layers.layer_norm(dim, **options)
        self.mlp = Mlp((dim, config.mlp_dim, dim), layers.gelu, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = self.norm1(x)
        if self.window:
            y = from_windows(self.attn(to_windows(y, self.window)), *x.shape[1:3])
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class Neck(nnx.Module):
    """A 1x1 and a 3x3 convolution to the decoder's width, each followed by a norm."""

    def __init__(self, config: SamConfig, **options: Any):
        dim, width = config.embed_dim, config.d_model
        self.conv1 = layers.linear(dim, width, use_bias=False, **options)
        self.norm1 = layers.layer_norm(width, **options)
        self.conv2 = nnx.Conv(width, width, (3, 3), padding=1, use_bias=False, **options)
        self.norm2 = layers.layer_norm(width, **options)

    def __call__(self, x: Float[Array, "B h w I"]) -> Float[Array, "B h w C"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class VisionTransformer(nnx.Module):
    """Patches, absolute positions, blocks, neck; `global_attn_indexes` see the whole image."""

    def __init__(self, config: SamConfig, **options: Any):
        side, dim = config.embedding_size, config.embed_dim
        self.patch_embed = VitPatchEmbed(dim, **options)
        self.pos_embed = nnx.Param(jnp.zeros((side, side, dim)))
        self.blocks = nnx.List(
            Block(config, 0 if i in config.global_attn_indexes else config.window_size, **options)
            for i in range(config.depth)
        )
        self.neck = Neck(config, **options)

    def __call__(self, images: Float[Array, "B A A 3"]) -> Float[Array, "B h w C"]:
        """The image embedding, stride 16."""
        x = self.patch_embed(images)
        x = x + self.pos_embed[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.neck(x)
