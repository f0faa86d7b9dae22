"""SAM 2's image encoder: Hiera, a hierarchical ViT with windowed attention, and a feature pyramid.

Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles" (2023), with
the windowed position embedding of Bolya et al., "Window Attention is Bugged" (2023).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models import layers
from lens_jax.models.long_attention import Attention
from lens_jax.models.sam.config import Sam2Config
from lens_jax.models.sam.layers import Mlp


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """The maximum over 2x2 cells; an odd last row or column is dropped."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def to_windows(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B*N w w C"]:
    """Cuts maps into windows of `window` cells a side, zero-padded at the right and the bottom."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.reshape(batch, rows, window, columns, window, channels)
    return x.swapaxes(2, 3).reshape(-1, window, window, channels)


def from_windows(x: Float[Array, "B*N w w C"], height: int, width: int) -> Float[Array, "B H W C"]:
    """Puts windows back together and cuts the padding off."""
    window, channels = x.shape[1], x.shape[3]
    rows, columns = -(-height // window), -(-width // window)
    x = x.reshape(-1, rows, columns, window, window, channels).swapaxes(2, 3)
    return x.reshape(-1, rows * window, columns * window, channels)[:, :height, :width]


def bicubic_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "O I"]:
    """The linear map of bicubic interpolation along one axis.

    Keys' kernel with a = -0.75, half-pixel centres, borders repeated, no antialiasing: what
    PyTorch's `interpolate(mode="bicubic", align_corners=False)` does.
    """
    a = -0.75
    center = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    first = np.floor(center).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        d = np.abs(center - first - tap)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        weight = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(size_out), np.clip(first + tap, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


class HieraPatchEmbed(nnx.Module):
    """A 7x7 convolution with stride 4."""

    def __init__(self, dim: int, **options: Any):
        self.proj = nnx.Conv(3, dim, (7, 7), strides=4, padding=3, **options)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H//4 W//4 C"]:
        return self.proj(images)


class MultiScaleAttention(nnx.Module):
    """Self-attention over each map of a batch; the queries may be pooled 2x2.

    `whole` attends when maps are whole images.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        pool: bool,
        whole: Attention | None,
        **options: Any,
    ):
        self.heads, self.pool, self.whole = heads, pool, whole
        self.qkv = layers.linear(dim, 3 * dim_out, **options)
        self.proj = layers.linear(dim_out, dim_out, **options)

    def __call__(self, x: Float[Array, "N H W I"]) -> Float[Array, "N h w O"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.pool:
            q = max_pool(q)
        batch, height, width, channels = q.shape
        q, k, v = (y.reshape(batch, -1, self.heads, channels // self.heads) for y in (q, k, v))
        out = self.whole.full(q, k, v) if self.whole else jax.nn.dot_product_attention(q, k, v)
        return self.proj(out.reshape(batch, height, width, channels))


class MultiScaleBlock(nnx.Module):
    """A transformer block in windows; the first one of a stage pools and widens."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        window: int,
        attention: Attention,
        **options: Any,
    ):
        self.window, self.pool = window, dim != dim_out
        self.norm1 = layers.layer_norm(dim, **options)
        whole = None if window or self.pool else attention
        self.attn = MultiScaleAttention(dim, dim_out, heads, self.pool, whole, **options)
        self.norm2 = layers.layer_norm(dim_out, **options)
        self.mlp = Mlp((dim_out, 4 * dim_out, dim_out), layers.gelu, **options)
        if self.pool:
            self.proj = layers.linear(dim, dim_out, **options)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shortcut, x = x, self.norm1(x)
        if self.pool:
            shortcut = max_pool(self.proj(x))
        if self.window:
            x = from_windows(self.attn(to_windows(x, self.window)), *shortcut.shape[1:3])
        else:
            x = self.attn(x)
        x = shortcut + x
        return x + self.mlp(self.norm2(x))


class Hiera(nnx.Module):
    """The trunk: one feature map a stage for each image."""

    def __init__(
        self,
        config: Sam2Config,
        *,
        attention: Attention,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        self.grid, options = config.image_size // 4, dict(rngs=rngs, dtype=dtype)
        init = nnx.initializers.truncated_normal(0.02)
        dim, window = config.embed_dim, config.window_spec[0]
        background = config.window_pos_embed_bkg_spatial_size
        self.patch_embed = HieraPatchEmbed(dim, **options)
        self.pos_embed = nnx.Param(init(rngs.params(), (*background, dim)))
        self.pos_embed_window = nnx.Param(init(rngs.params(), (window, window, dim)))
        self.stage_ends = tuple(int(end) - 1 for end in np.cumsum(config.stages))
        blocks = []
        for stage, depth in enumerate(config.stages):
            for i in range(depth):
                # The first block of a stage still attends in its predecessor's windows.
                before = max(stage - 1, 0) if i == 0 else stage
                is_global = len(blocks) in config.global_att_blocks
                blocks.append(
                    MultiScaleBlock(
                        config.stage_dims[before],
                        config.stage_dims[stage],
                        config.num_heads * 2**stage,
                        0 if is_global else config.window_spec[before],
                        attention,
                        **options,
                    )
                )
        self.blocks = nnx.List(blocks)

    def position_embedding(self) -> Float[Array, "h w C"]:
        """A coarse embedding of the whole image plus one that repeats in every window."""
        rows, columns = (bicubic_matrix(size, self.grid) for size in self.pos_embed.shape[:2])
        background = jnp.einsum("hi,wj,ijc->hwc", rows, columns, self.pos_embed[...])
        repeat = self.grid // self.pos_embed_window.shape[0]
        return background + jnp.tile(self.pos_embed_window[...], (repeat, repeat, 1))

    def __call__(self, images: Float[Array, "B A A 3"]) -> list[Float[Array, "B h w C"]]:
        """Feature maps of all stages, strides 4, 8, 16, 32."""
        x = self.patch_embed(images)
        x = x + self.position_embedding().astype(x.dtype)
        features, last = [], -1
        for blocks, count in layers.stacks(self.blocks):
            if count == 1:  # it may pool
                x = layers.layer(blocks, 0)(x)
            else:
                x, _ = layers.scan(blocks, lambda block, x: (block(x), None), x)
            last += count
            if last in self.stage_ends:
                features.append(x)
        return features


class FpnNeck(nnx.Module):
    """The feature pyramid (Lin et al., "Feature Pyramid Networks", 2017).

    It projects every stage to `d_model`; coarse levels flow into the next finer ones. `convs` (1x1,
    so linear) run from the coarsest level to the finest, as in the original.
    """

    def __init__(self, config: Sam2Config, **options: Any):
        self.top_down, self.scalp = config.fpn_top_down_levels, config.scalp
        self.convs = nnx.List(
            layers.linear(dim, config.d_model, **options) for dim in config.stage_dims[::-1]
        )

    def __call__(self, stages: list[Float[Array, "B h w I"]]) -> list[Float[Array, "B h w C"]]:
        """Feature levels, finest first, without the `scalp` coarsest ones."""
        coarsest = len(stages) - 1
        levels, previous = [], None
        for level in range(coarsest, -1, -1):
            x = self.convs[coarsest - level](stages[level])
            if level in self.top_down and previous is not None:
                x = x + previous.repeat(2, axis=1).repeat(2, axis=2)
            levels.insert(0, x)
            previous = x
        return levels[: len(levels) - self.scalp]


class HieraEncoder(nnx.Module):
    """Trunk and feature pyramid."""

    def __init__(self, config: Sam2Config, *, attention: Attention, **options: Any):
        self.trunk = Hiera(config, attention=attention, **options)
        self.neck = FpnNeck(config, **options)

    def __call__(self, images: Float[Array, "B A A 3"]) -> list[Float[Array, "B h w C"]]:
        return self.neck(self.trunk(images))
