"""Shapes of Qwen2.5-VL, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `window_size` is in pixels of the resized picture."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]
    patch_size: int = 14
    temporal_patch_size: int = 2
    in_channels: int = 3
    merge_size: int = 2
    window_size: int = 112

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches in a window, S."""
        merged = self.window_size // self.patch_size // self.merge_size
        return (merged * self.merge_size) ** 2


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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "QwenVLConfig":
        """Reads config.json, flat (transformers < 4.52, LENS) or with a nested `text_config`.

        Raises:
            ValueError: a key is missing, or the file does not describe Qwen2.5-VL.
        """
        text = {**hf, **(hf.get("text_config") or {})}
        vision = hf.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        # LENS writes model_type qwen2_vl for both families: only 2.5 has windows.
        if "fullatt_block_indexes" not in vision:
            raise ValueError(
                "config.json: vision_config has no fullatt_block_indexes: this is not Qwen2.5-VL"
            )
        try:
            return cls(
                hidden_size=text["hidden_size"],
                intermediate_size=text["intermediate_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                vocab_size=text["vocab_size"],
                rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
                mrope_section=tuple(rope["mrope_section"]),
                rms_norm_eps=text["rms_norm_eps"],
                # The nested text config carries a default of its own; the outer flag decides.
                tie_word_embeddings=hf.get(
                    "tie_word_embeddings", text.get("tie_word_embeddings", False)
                ),
                image_token_id=hf["image_token_id"],
                vision=VisionConfig(
                    depth=vision["depth"],
                    hidden_size=vision["hidden_size"],
                    intermediate_size=vision["intermediate_size"],
                    num_heads=vision["num_heads"],
                    out_hidden_size=vision["out_hidden_size"],
                    full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
                    patch_size=vision.get("patch_size", 14),
                    temporal_patch_size=vision.get("temporal_patch_size", 2),
                    in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                    merge_size=vision.get("spatial_merge_size", 2),
                    window_size=vision.get("window_size", 112),
                ),
            )
        except KeyError as missing:
            raise ValueError(f"config.json: no key {missing}, which Qwen2.5-VL needs") from None
