"""Prompts as embeddings: points, boxes, masks (Kirillov et al., "Segment Anything", 2023)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lens_jax.models.layers import gelu, layer_norm, linear
from lens_jax.models.sam.config import DecoderConfig

MASK_CHANNELS = 16
NOT_A_POINT, NEGATIVE, POSITIVE, BOX_START, BOX_END = -1, 0, 1, 2, 3


class PositionEmbeddingRandom(nnx.Module):
    """Random Fourier features of a position (Tancik et al., 2020).

    The frequencies are constants that a checkpoint stores: no gradient reaches them.
    """

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.positional_encoding_gaussian_matrix = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), (2, features // 2))
        )

    def __call__(self, positions: Float[Array, "*batch 2"]) -> Float[Array, "*batch C"]:
        """Sines and cosines of (x, y) in [0, 1]; always float32."""
        frequencies = jax.lax.stop_gradient(self.positional_encoding_gaussian_matrix[...])
        angles = 2 * np.pi * jnp.matmul(2 * positions - 1, frequencies, precision="highest")
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskDownscaling(nnx.Module):
    """Two 2x2 convolutions of stride 2 and a projection."""

    def __init__(self, dim: int, **options: Any):
        few, many = MASK_CHANNELS // 4, MASK_CHANNELS
        self.conv1 = nnx.Conv(1, few, (2, 2), strides=2, padding=0, **options)
        self.norm1 = layer_norm(few, **options)
        self.conv2 = nnx.Conv(few, many, (2, 2), strides=2, padding=0, **options)
        self.norm2 = layer_norm(many, **options)
        self.conv3 = linear(many, dim, **options)

    def __call__(self, masks: Float[Array, "*batch 4*h 4*w 1"]) -> Float[Array, "*batch h w C"]:
        x = gelu(self.norm1(self.conv1(masks)))
        x = gelu(self.norm2(self.conv2(x)))
        return self.conv3(x)


class SamPromptEncoder(nnx.Module):
    """Points and boxes become sparse tokens, masks a map that is added to the image embedding.

    A caller may bring sparse tokens of its own, as LENS does; they need nothing from here but
    `no_mask` for the missing mask.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.image_size, self.embedding_size = config.image_size, config.embedding_size
        self.dtype = dtype
        dim, init = config.d_model, nnx.initializers.normal(1.0)
        self.pe_layer = PositionEmbeddingRandom(dim, rngs=rngs)
        # Indexed by label: background, foreground, upper left and lower right corner of a box.
        self.point_embeddings = nnx.List(
            nnx.Embed(1, dim, embedding_init=init, rngs=rngs) for _ in range(4)
        )
        self.not_a_point_embed = nnx.Embed(1, dim, embedding_init=init, rngs=rngs)
        self.mask_downscaling = MaskDownscaling(dim, rngs=rngs, dtype=dtype)
        self.no_mask_embed = nnx.Embed(1, dim, embedding_init=init, rngs=rngs)

    def embed_points(
        self,
        points: Float[Array, "*batch N 2"],
        labels: Int[Array, "*batch N"],
        *,
        pad: bool = True,
    ) -> Float[Array, "*batch N+pad C"]:
        """Sparse tokens of points (x, y) in pixels of the image that SAM reads.

        Labels: 1 foreground, 0 background, 2 and 3 corners of a box, -1 no point at all. SAM ends
        a list of points with one that is none (`pad`) unless a box follows.
        """
        if pad:
            widths = [(0, 0)] * (points.ndim - 2)
            points = jnp.pad(points, (*widths, (0, 1), (0, 0)))
            labels = jnp.pad(labels, (*widths, (0, 1)), constant_values=NOT_A_POINT)
        position = self.pe_layer((points + 0.5) / self.image_size)
        kinds = jnp.concatenate([embed.embedding[...] for embed in self.point_embeddings])
        tokens = position + kinds[jnp.maximum(labels, 0)]
        is_point = (labels != NOT_A_POINT)[..., None]
        return jnp.where(is_point, tokens, self.not_a_point_embed.embedding[0]).astype(self.dtype)

    def embed_boxes(self, boxes: Float[Array, "*batch 4"]) -> Float[Array, "*batch 2 C"]:
        """Sparse tokens of boxes (xyxy, pixels of the image that SAM reads), one a corner."""
        corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
        labels = jnp.broadcast_to(jnp.array([BOX_START, BOX_END]), corners.shape[:-1])
        return self.embed_points(corners, labels, pad=False)

    def embed_masks(self, masks: Float[Array, "*batch 4*h 4*w"]) -> Float[Array, "*batch h w C"]:
        """The dense embedding of mask logits with four times the image embedding's side."""
        return self.mask_downscaling(masks[..., None].astype(self.dtype))

    def no_mask(self) -> Float[Array, "C"]:
        """The dense embedding of a prompt without a mask, the same for every cell."""
        return self.no_mask_embed.embedding[0].astype(self.dtype)

    def dense_pe(self) -> Float[Array, "h w C"]:
        """The position encoding of every cell's centre."""
        center = (jnp.arange(self.embedding_size) + 0.5) / self.embedding_size
        x, y = jnp.meshgrid(center, center)
        return self.pe_layer(jnp.stack([x, y], axis=-1)).astype(self.dtype)
