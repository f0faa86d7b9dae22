"""The vision towers of Qwen2-VL and Qwen2.5-VL: blocks of attention, then a 2x2 merger.

They differ in norms, in MLPs, and in that Qwen2.5-VL attends within windows in most blocks.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lens_jax.models import layers
from lens_jax.models.attention import XLA, Attention, attention
from lens_jax.models.qwen_vl.config import VisionConfig
from lens_jax.models.rope import Rotation, grid_rotation, rotate


def _norm(config: VisionConfig, *, rngs: nnx.Rngs, dtype) -> nnx.Module:
    options = dict(epsilon=1e-6, dtype=dtype, rngs=rngs)
    if config.family == "qwen2_vl":
        return nnx.LayerNorm(config.hidden_size, use_fast_variance=False, **options)
    return nnx.RMSNorm(config.hidden_size, **options)


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP, on windows [B, W, S] or on whole pictures [B, 1, W*S]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        width, mlp = config.hidden_size, config.intermediate_size
        self.family, self.num_heads = config.family, config.num_heads
        linear = dict(dtype=dtype, rngs=rngs)
        self.norm1 = _norm(config, **linear)
        self.norm2 = _norm(config, **linear)
        self.qkv = nnx.Linear(width, 3 * width, **linear)
        self.proj = nnx.Linear(width, width, **linear)
        if self.family == "qwen2_vl":
            self.fc1 = nnx.Linear(width, mlp, **linear)
            self.fc2 = nnx.Linear(mlp, width, **linear)
        else:
            self.gate_proj = nnx.Linear(width, mlp, dot_general=layers.widen, **linear)
            self.up_proj = nnx.Linear(width, mlp, dot_general=layers.widen, **linear)
            self.down_proj = nnx.Linear(mlp, width, **linear)

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
            h = self.fc1(x)
            return self.fc2(h * jax.nn.sigmoid(1.702 * h))
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class PatchMerger(nnx.Module):
    """Four neighbouring patches become one token of the language model's width."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.merged = config.hidden_size * config.merge_size**2
        self.norm = _norm(config, rngs=rngs, dtype=dtype)
        self.fc1 = nnx.Linear(self.merged, self.merged, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(self.merged, config.out_hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B W S d"]) -> Float[Array, "B U D"]:
        x = self.norm(x).reshape(x.shape[0], -1, self.merged)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Pictures, cut into patches in window order (`Prompts`), to tokens of the language model."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: Attention = XLA,
    ):
        self.config = config
        self.attention = attention
        self.patch_embed = nnx.Linear(
            config.patch_dim, config.hidden_size, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.blocks = layers.stack(
            lambda r: VisionBlock(config, rngs=r, dtype=dtype), config.depth, rngs
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
        """Merged tokens, U = W * S / 4, still in window order; those of padding are arbitrary."""
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
    """Pictures [B, 1, W * S, N, H] to all of their patches."""
    return kernel.full(*(x[:, 0] for x in parts), mask.reshape(len(mask), -1))[:, None]


def _join_windows(x: Array) -> Array:
    """[B, W, S, ...] -> [B, 1, W * S, ...]."""
    return x.reshape(x.shape[0], 1, -1, *x.shape[3:])
