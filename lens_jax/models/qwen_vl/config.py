"""Shapes of Qwen2-VL and Qwen2.5-VL, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["qwen2_vl", "qwen2_5_vl"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower, of one of two families.

    `qwen2_5_vl` attends within windows of `window_size` pixels of the resized picture, but for
    `full_attention_blocks`; its norms are RMSNorms, its MLPs SwiGLUs. In `qwen2_vl` every block
    attends to the whole picture, whose patches come in windows all the same; its norms are
    LayerNorms, its MLPs quick GELUs.
    """

    family: Family
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
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def window_side(self) -> int:
        """Patches on a window's side; whole merged units."""
        return self.window_size // self.patch_size // self.merge_size * self.merge_size

    @property
    def window_patches(self) -> int:
        """Patches in a window, S."""
        return self.window_side**2


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
            ValueError: a key is missing, or the file describes neither family, or two at once.
        """
        text = {**hf, **(hf.get("text_config") or {})}
        vision = hf.get("vision_config") or {}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        family = _family(hf.get("model_type"), vision)
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
                vision=_vision(family, vision, text["hidden_size"]),
            )
        except KeyError as missing:
            raise ValueError(
                f"config.json: no key {missing}, which {_NAMES[family]} needs"
            ) from None


_NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}
# Keys of vision_config that only one family reads. A Qwen2.5-VL that LENS has saved carries those
# of Qwen2-VL too, at their defaults, for its model_type names the other family's class.
_ONLY_2_5 = ("fullatt_block_indexes", "window_size", "out_hidden_size")
_ONLY_2 = ("embed_dim", "mlp_ratio")


def _family(model_type: str | None, vision: Mapping[str, Any]) -> Family:
    """By what vision_config holds: LENS writes model_type qwen2_vl for both families."""
    if own := [key for key in _ONLY_2_5 if key in vision]:
        if "fullatt_block_indexes" not in vision:
            raise ValueError(
                f"config.json: vision_config has {own[0]} but no fullatt_block_indexes: this is "
                "not Qwen2.5-VL, and not Qwen2-VL either"
            )
        return "qwen2_5_vl"
    if not all(key in vision for key in _ONLY_2):
        raise ValueError(
            f"config.json: vision_config has neither {' and '.join(_ONLY_2)}, as Qwen2-VL, nor "
            f"{_ONLY_2_5[0]}, as Qwen2.5-VL; other models are not supported"
        )
    if model_type == "qwen2_5_vl":
        raise ValueError(
            "config.json: model_type is qwen2_5_vl, but vision_config is that of Qwen2-VL: it has "
            f"no {_ONLY_2_5[0]}"
        )
    return "qwen2_vl"


def _vision(family: Family, vision: Mapping[str, Any], width: int) -> VisionConfig:
    """The vision tower's shapes; `width` is the language model's."""
    if family == "qwen2_5_vl":
        own = dict(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["intermediate_size"],
            out_hidden_size=vision["out_hidden_size"],
            full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
            window_size=vision.get("window_size", 112),
        )
    else:
        if (activation := vision.get("hidden_act", "quick_gelu")) != "quick_gelu":
            raise ValueError(
                f"config.json: vision_config's hidden_act is {activation}, Qwen2-VL's quick_gelu"
            )
        own = dict(
            hidden_size=vision["embed_dim"],
            intermediate_size=int(vision["embed_dim"] * vision["mlp_ratio"]),
            # Some versions of transformers leave it out when it is 3584.
            out_hidden_size=vision.get("hidden_size", width),
            full_attention_blocks=tuple(range(vision["depth"])),
        )
    if own["out_hidden_size"] != width:
        raise ValueError(
            f"config.json: vision_config's tokens are {own['out_hidden_size']} wide, the language "
            f"model's {width}"
        )
    return VisionConfig(
        family=family,
        depth=vision["depth"],
        num_heads=vision["num_heads"],
        patch_size=vision.get("patch_size", 14),
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
        merge_size=vision.get("spatial_merge_size", 2),
        **own,
    )


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
