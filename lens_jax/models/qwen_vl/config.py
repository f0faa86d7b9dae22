"""Shapes of Qwen2-VL and Qwen2.5-VL, and the published ones."""

import dataclasses
from typing import Literal

from lens_jax.models.geometry import ImageGeometry

Family = Literal["qwen2_vl", "qwen2_5_vl"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(ImageGeometry):
    """The vision tower, of one of two families.

    `qwen2_5_vl` attends within windows of `window_size` pixels of the resized image, but for
    `full_attention_blocks`; its norms are RMSNorms, its MLPs SwiGLUs. In `qwen2_vl` every block
    attends to the whole image, whose patches come in windows all the same; its norms are
    LayerNorms, its MLPs quick GELUs.
    """

    family: Family
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]
    in_channels: int = 3

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """The language model, with its vision tower and the token ids that tie them."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    image_token_id: int
    vision: VisionConfig

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


_QWEN2_5_VL_3B = QwenVLConfig(
    hidden_size=2048,
    intermediate_size=11008,
    num_layers=36,
    num_heads=16,
    num_kv_heads=2,
    vocab_size=151936,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    image_token_id=151655,
    vision=VisionConfig(
        family="qwen2_5_vl",
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        full_attention_blocks=(7, 15, 23, 31),
    ),
)
# What LENS is trained from, by the names they are published under.
PRESETS = {
    "Qwen2.5-VL-3B-Instruct": _QWEN2_5_VL_3B,
    "Qwen2-VL-2B-Instruct": dataclasses.replace(
        _QWEN2_5_VL_3B,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        vision=VisionConfig(
            family="qwen2_vl",
            depth=32,
            hidden_size=1280,
            intermediate_size=5120,
            num_heads=16,
            out_hidden_size=1536,
            full_attention_blocks=tuple(range(32)),
        ),
    ),
}
