"""The vision towers of Qwen2-VL and Qwen2.5-VL: blocks of attention, then a 2x2 merger.

They differ in norms, in MLPs, and in that Qwen2.5-VL attends within windows in most blocks.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lens_jax.models import layers
from lens_jax.models.attention import attention
from lens_jax.models.long_attention import XLA, Attention
from lens_jax.models.qwen_vl.config import VisionConfig
from lens_jax.models.rope import Rotation, grid_rotation, rotate


def _norm(config: VisionConfig, **options: Any) -> nnx.Module:
    if config.family == "qwen2_vl":
        return layers.layer_norm(config.hidden_size, **options)
    return nnx.RMSNorm(config.hidden_size, epsilon=1e-6, **options)


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP, on windows [B, W, S] or on whole images [B, 1, W*S]."""

    def __init__(self, config: VisionConfig, **options: Any):
        width, mlp = config.hidden_size, config.intermediate_size
        self.family, self.num_heads = config.family, config.num_heads
        self.norm1 = _norm(config, **options)
        self.norm2 = _norm(config, **options)
        self.qkv = layers.linear(width, 3 * width, **options)
        self.proj = layers.linear(width, width, **options)
        if self.family == "qwen2_vl":
            self.fc1 = layers.linear(width, mlp, **options)
            self.fc2 = layers.linear(mlp, width, **options)
        else:
            self.gate_proj = layers.linear(width, mlp, wide=True, **options)
            self.up_proj = layers.linear(width, mlp, wide=True, **options)
            self.down_proj = layers.linear(mlp, width, **options)

    def __call__(
        self, x: Float[Array, "B W S d"], rotation: Rotation, attend: Callable[..., Array]
    ) -> Float[Array, "B W S d"]:
        """`attend` takes queries, keys and values [B, W, S, N, H]."""
        b, w, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, w, s, 3, self.num_heads, -1)
        queries, keys, values = (qkv[..., i, :, :] for i in range(3))
        attended = attend(rotate(queries, rotation), rotate(keys, rotation), values)
        x = x + self.proj(attended.reshape(x.shape))
        return x + self.mlp(self.norm2(x))

    def mlp(self, x: Float[Array, "B W S d"]) -> Float[Array, "B W S d"]:
        """Quick GELU (Qwen2-VL) or SwiGLU."""
        if self.family == "qwen2_vl":
            return self.fc2(layers.quick_gelu(self.fc1(x)))
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class PatchMerger(nnx.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: VisionConfig, **options: Any):
        self.merged = config.hidden_size * config.merge_size**2
        self.norm = _norm(config, **options)
        self.fc1 = layers.linear(self.merged, self.merged, **options)
        self.fc2 = layers.linear(self.merged, config.out_hidden_size, **options)

    def __call__(self, x: Float[Array, "B W S d"]) -> Float[Array, "B U D"]:
        x = self.norm(x).reshape(x.shape[0], -1, self.merged)
        return self.fc2(layers.gelu(self.fc1(x)))


class VisionTower(nnx.Module):
    """Tokens of the language model from images, cut into patches in window order (`Prompts`)."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: Attention = XLA,
    ):
        self.config, self.attention = config, attention
        self.patch_embed = layers.linear(
            config.patch_dim, config.hidden_size, use_bias=False, rngs=rngs, dtype=dtype
        )
        self.blocks = layers.stack(
            lambda rngs: VisionBlock(config, rngs=rngs, dtype=dtype), config.depth, rngs
        )
        self.merger = PatchMerger(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        patches: Float[Array, "B W S C"],
        positions: Int[Array, "B W S 2"],
        mask: Bool[Array, "B W S"],
        *,
        remat: str = "none",
    ) -> Float[Array, "B U D"]:
        """Merged tokens, U = W * S / 4, in window order still; those of padding are arbitrary."""
        config = self.config
        x = self.patch_embed(patches)
        rotation = grid_rotation(positions, config.head_dim)
        window = positions // config.window_side
        sees = (window[:, :, :, None] == window[:, :, None]).all(-1) & mask[:, :, None]
        in_windows = rotation, lambda *parts: attention(*parts, sees)
        whole = jax.tree.map(_join_windows, rotation), partial(_attend_whole, self.attention, mask)

        full = [i in config.full_attention_blocks for i in range(config.depth)]
        stacks, period = layers.periods(self.blocks, full)

        def run(blocks, x):
            # Neighbours that attend alike run in one scan.
            for is_full, places in itertools.groupby(range(period), full.__getitem__):
                first, *more = places
                shape, view = x.shape, in_windows
                if is_full:
                    x, view = _join_windows(x), whole
                x, _ = layers.scan(
                    blocks,
                    lambda block, x, view=view: (block(x, *view), None),
                    x,
                    remat=remat,
                    first=first,
                    last=first + len(more) + 1,
                )
                x = x.reshape(shape)
            return x, None

        x, _ = layers.scan(stacks, run, x)
        return self.merger(x)


def _attend_whole(kernel: Attention, mask: Bool[Array, "B W S"], *parts: Array) -> Array:
    """Attention of images [B, 1, W * S, N, H] to all of their patches."""
    return kernel.full(*(x[:, 0] for x in parts), mask.reshape(len(mask), -1))[:, None]


def _join_windows(x: Array) -> Array:
    """[B, W, S, ...] -> [B, 1, W * S, ...]."""
    return x.reshape(x.shape[0], 1, -1, *x.shape[3:])
