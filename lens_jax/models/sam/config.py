"""Shapes of SAM 1 and of SAM 2's image model, and the published ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]

PATCH = 16  # pixels a side of a cell of the image embedding

# What every published SAM 2 does and this port takes for granted.
FIXED = {
    "use_high_res_features_in_sam": True,
    "pred_obj_scores": True,
    "pred_obj_scores_mlp": True,
    "iou_prediction_use_sigmoid": True,
    "dynamic_multimask_via_stability": True,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What prompt encoder and mask decoder need: the same in SAM 1 and SAM 2.

    A picture is a square of `image_size` pixels; its image embedding has a cell for every patch of
    16 x 16 pixels and the width `d_model`.
    """

    image_size: int = 1024
    d_model: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256

    def __post_init__(self):
        if self.d_model % 8 or self.d_model // self.attention_downsample_rate % self.decoder_heads:
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 8 and, divided by "
                f"attention_downsample_rate {self.attention_downsample_rate}, of the "
                f"{self.decoder_heads} decoder heads"
            )

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding in cells; masks have four times this side."""
        return self.image_size // PATCH

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution mask logits in pixels."""
        return 4 * self.embedding_size


# Sections and keys of Hugging Face's SamConfig -> our fields, and what this port takes for granted.
HF_MASK_DECODER = {  # SAM 2's, too
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_depth",
    "num_attention_heads": "decoder_heads",
    "mlp_dim": "decoder_mlp_dim",
    "attention_downsample_rate": "attention_downsample_rate",
    "num_multimask_outputs": "num_multimask_outputs",
    "iou_head_depth": "iou_head_depth",
    "iou_head_hidden_dim": "iou_head_hidden_dim",
}
_HF_FIELDS = {
    "vision_config": {
        "image_size": "image_size",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "global_attn_indexes": "global_attn_indexes",
        "window_size": "window_size",
        "mlp_dim": "mlp_dim",
        "output_channels": "d_model",
    },
    "prompt_encoder_config": {"image_size": "image_size", "hidden_size": "d_model"},
    "mask_decoder_config": HF_MASK_DECODER,
}
_HF_FIXED = {
    "vision_config": {
        "patch_size": PATCH,
        "num_channels": 3,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "prompt_encoder_config": {
        "patch_size": PATCH,
        "mask_input_channels": 16,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
    },
    "mask_decoder_config": {"hidden_act": "relu"},
}


def read_sections(
    config: Mapping[str, Any],
    fields: Mapping[str, Mapping[str, str]],
    fixed: Mapping[str, Mapping[str, Any]],
    defaults: DecoderConfig,
    where: str,
) -> dict[str, Any]:
    """Fields of a configuration from the sections of a Hugging Face config.json.

    Args:
      config: the file's content. A key that is null counts as left out; a field that no key
        gives has its default.
      fields: section (a path of keys, joined by dots) -> key -> our field; several keys may
        stand for one field.
      fixed: section -> key -> the only value this port has.
      defaults: of the fields.
      where: the file, named in messages.

    Raises:
      ValueError: on a value that this port does not have, or two that contradict each other.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for section, keys in fields.items():
        values: Any = config
        for key in filter(None, section.split(".")):
            values = values.get(key) or {}
        prefix = f"{section}." if section else ""
        values = {key: value for key, value in values.items() if value is not None}
        for key, expected in fixed.get(section, {}).items():
            if values.get(key, expected) != expected:
                raise ValueError(
                    f"{where}: {prefix}{key} = {values[key]} is not supported, only {expected}"
                )
        for key, field in keys.items():
            if key not in values:
                continue
            value = tuple(values[key]) if isinstance(values[key], list) else values[key]
            if found.setdefault(field, value) != value:
                raise ValueError(
                    f"{where}: {prefix}{key} = {value} contradicts {said[field]} = {found[field]}"
                )
            said.setdefault(field, f"{prefix}{key}")
    for keys in fields.values():
        found |= {field: getattr(defaults, field) for field in keys.values() if field not in found}
    return found


@dataclasses.dataclass(frozen=True)
class SamConfig(DecoderConfig):
    """Hyper-parameters of SAM 1; names follow the original code, defaults are those of ViT-B.

    The blocks in `global_attn_indexes` see the whole picture, the others windows of `window_size`
    cells a side.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: Shape = (2, 5, 8, 11)
    window_size: int = 14
    mlp_dim: int = 3072

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % PATCH:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {PATCH}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} must be a multiple of the {self.num_heads} heads"
            )
        if outside := [i for i in self.global_attn_indexes if not 0 <= i < self.depth]:
            raise ValueError(f"global_attn_indexes: {outside} are none of {self.depth} blocks")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "sam_config.json") -> SamConfig:
        """Reads the form of Hugging Face's SamConfig, where what is not said is as in ViT-B.

        `layer_norm_eps` of mask_decoder_config is passed over: Hugging Face's published files say
        1e-6, where Meta's code, and ours, have 1e-5.

        Raises:
          ValueError: on a switch that this port does not have, or contradicting shapes.
          KeyError: without a vision_config.
        """
        if config.get("model_type", "sam") != "sam":
            raise ValueError(f"{where}: model_type {config['model_type']!r} is not that of SAM 1")
        vision = config["vision_config"]
        if vision.get("mlp_dim") is None:
            width = vision.get("hidden_size", cls.embed_dim)
            vision = {**vision, "mlp_dim": int(width * vision.get("mlp_ratio", 4))}
        sections = {**config, "vision_config": vision}
        fields = read_sections(sections, _HF_FIELDS, _HF_FIXED, cls(), where)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The form that `from_dict` and transformers read, with `image_size` in front."""
        sections: dict[str, Any] = {}
        for section, keys in _HF_FIELDS.items():
            values = {key: getattr(self, field) for key, field in keys.items()}
            sections[section] = _HF_FIXED[section] | {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in values.items()
            }
        sections["vision_config"]["num_pos_feats"] = self.d_model // 2
        sections["mask_decoder_config"]["layer_norm_eps"] = 1e-5
        return {"model_type": "sam", "image_size": self.image_size, **sections}

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape], where: str = "the checkpoint") -> SamConfig:
        """Recognises a published model by the shapes of its tensors, original names, no prefix.

        Raises:
          ValueError: when no published model has these shapes.
        """
        try:
            _, cells, _, embed_dim = shapes["image_encoder.pos_embed"]
        except (KeyError, ValueError):
            raise ValueError(
                f"{where} holds no SAM 1: image_encoder.pos_embed [1, h, w, C] is missing"
            ) from None
        block = re.compile(r"image_encoder\.blocks\.\d+\.norm1\.weight")
        depth = sum(block.fullmatch(name) is not None for name in shapes)
        for preset in SAM_PRESETS.values():
            if (preset.embedding_size, preset.embed_dim, preset.depth) == (cells, embed_dim, depth):
                return preset
        raise ValueError(
            f"{where} has an image encoder of {depth} blocks of width {embed_dim} on {cells} x "
            f"{cells} cells, which is no published SAM 1; put its sam_config.json beside it"
        )


def sam_config(config: Mapping[str, Any], where: str = "sam") -> SamConfig | Sam2Config:
    """Reads either family by its `model_type`; without one it is SAM 2.

    Raises:
      ValueError: another family, a switch that this port does not have, contradicting shapes.
      KeyError: on a missing key.
    """
    families = {"sam": SamConfig, "sam2": Sam2Config}
    family = config.get("model_type", "sam2")
    if family not in families:
        raise ValueError(f"{where}: model_type {family!r} is none of {', '.join(families)}")
    return families[family].from_dict(config, where)


@dataclasses.dataclass(frozen=True)
class Sam2Config(DecoderConfig):
    """Hyper-parameters of SAM 2; names follow the original configuration files.

    A stage of the trunk halves the resolution and doubles width and heads. `window_spec` is the
    attention window of each stage in tokens; the blocks in `global_att_blocks` see everything. The
    neck projects each stage to `d_model`; the decoder works at that width. Without the `scalp`
    coarsest levels, three remain: the image embedding (stride 16) and two of higher resolution.
    """

    embed_dim: int = 144
    num_heads: int = 2
    stages: Shape = (2, 6, 36, 4)
    global_att_blocks: Shape = (23, 33, 43)
    window_pos_embed_bkg_spatial_size: Shape = (7, 7)
    window_spec: Shape = (8, 4, 16, 8)
    fpn_top_down_levels: Shape = (2, 3)
    scalp: int = 1
    directly_add_no_mem_embed: bool = True
    stability_delta: float = 0.05
    stability_thresh: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        stride = 4 * 2 ** (len(self.stages) - 1)
        if len(self.window_spec) != len(self.stages):
            raise ValueError(
                f"window_spec {self.window_spec} needs one window for each of the "
                f"{len(self.stages)} stages"
            )
        if len(self.stages) - self.scalp != 3:
            raise ValueError(
                f"{len(self.stages)} stages without the scalp of {self.scalp} leave "
                f"{len(self.stages) - self.scalp} feature levels; the mask decoder takes 3"
            )
        if self.image_size % stride or (self.image_size // 4) % self.window_spec[0]:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {stride} and of "
                f"{4 * self.window_spec[0]} (a window of {self.window_spec[0]} tokens)"
            )

    @property
    def stage_dims(self) -> Shape:
        """Width of each trunk stage, finest first."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.stages)))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "sam2_config.json") -> Sam2Config:
        """Reads the nested form with the keys `trunk`, `neck` and `decoder`.

        Raises:
          ValueError: on a switch that this port does not have, or contradicting shapes.
          KeyError: on a missing key.
        """
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{where}: {key} = {config[key]} is not supported, only {value}")
        trunk, neck, decoder = config["trunk"], config["neck"], config["decoder"]
        if neck.get("fpn_interp_model", "nearest") != "nearest":
            raise ValueError(
                f"{where}: neck.fpn_interp_model = {neck['fpn_interp_model']} is not supported, "
                "only nearest"
            )
        if decoder["transformer_dim"] != neck["d_model"]:
            raise ValueError(
                f"{where}: decoder.transformer_dim {decoder['transformer_dim']} and neck.d_model "
                f"{neck['d_model']} must be equal"
            )
        result = cls(
            image_size=config["image_size"],
            embed_dim=trunk["embed_dim"],
            num_heads=trunk["num_heads"],
            stages=tuple(trunk["stages"]),
            global_att_blocks=tuple(trunk["global_att_blocks"]),
            window_pos_embed_bkg_spatial_size=tuple(trunk["window_pos_embed_bkg_spatial_size"]),
            window_spec=tuple(trunk["window_spec"]),
            d_model=neck["d_model"],
            fpn_top_down_levels=tuple(neck["fpn_top_down_levels"]),
            scalp=config["scalp"],
            directly_add_no_mem_embed=config["directly_add_no_mem_embed"],
            decoder_depth=decoder["depth"],
            decoder_heads=decoder["heads"],
            decoder_mlp_dim=decoder["mlp_dim"],
            attention_downsample_rate=decoder["attention_downsample_rate"],
            num_multimask_outputs=decoder["num_multimask_outputs"],
            iou_head_depth=decoder["iou_head_depth"],
            iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
            stability_delta=config.get("dynamic_multimask_stability_delta", 0.05),
            stability_thresh=config.get("dynamic_multimask_stability_thresh", 0.98),
        )
        channels = tuple(neck.get("backbone_channel_list", result.stage_dims[::-1]))
        if channels != result.stage_dims[::-1]:
            raise ValueError(
                f"{where}: neck.backbone_channel_list {list(channels)} does not fit the trunk's "
                f"{list(result.stage_dims[::-1])}"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The nested form that `from_dict` reads."""
        cells = [self.embedding_size * 2**level for level in (2, 1, 0)]
        return {
            "image_size": self.image_size,
            "trunk": {
                "embed_dim": self.embed_dim,
                "num_heads": self.num_heads,
                "stages": list(self.stages),
                "global_att_blocks": list(self.global_att_blocks),
                "window_pos_embed_bkg_spatial_size": list(self.window_pos_embed_bkg_spatial_size),
                "window_spec": list(self.window_spec),
            },
            "neck": {
                "d_model": self.d_model,
                "backbone_channel_list": list(self.stage_dims[::-1]),
                "fpn_top_down_levels": list(self.fpn_top_down_levels),
                "fpn_interp_model": "nearest",
            },
            "scalp": self.scalp,
            "feature_sizes": [[side, side] for side in cells],
            "low_res_mask_size": [self.mask_size, self.mask_size],
            "decoder": {
                "transformer_dim": self.d_model,
                "depth": self.decoder_depth,
                "heads": self.decoder_heads,
                "mlp_dim": self.decoder_mlp_dim,
                "attention_downsample_rate": self.attention_downsample_rate,
                "num_multimask_outputs": self.num_multimask_outputs,
                "iou_head_depth": self.iou_head_depth,
                "iou_head_hidden_dim": self.iou_head_hidden_dim,
            },
            "directly_add_no_mem_embed": self.directly_add_no_mem_embed,
            **FIXED,
            "dynamic_multimask_stability_delta": self.stability_delta,
            "dynamic_multimask_stability_thresh": self.stability_thresh,
        }

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape], where: str = "the checkpoint") -> Sam2Config:
        """Recognises a published model by the shapes of its tensors, original names, no prefix.

        Heads, windows and global blocks leave no trace in shapes, so only published models can be
        told; SAM 2 and 2.1 differ only in tensors that the image model does not use.

        Raises:
          ValueError: when no published model has these shapes.
        """
        try:
            embed_dim = shapes["image_encoder.trunk.patch_embed.proj.weight"][0]
        except KeyError as error:
            raise ValueError(f"{where} holds no SAM 2 trunk: {error} is missing") from None
        block = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.norm2\.weight")
        widths = [shape[0] for name, shape in shapes.items() if block.fullmatch(name)]
        stages = tuple(widths.count(width) for width in sorted(set(widths)))
        for preset in PRESETS.values():
            if (preset.embed_dim, preset.stages) == (embed_dim, stages):
                return preset
        raise ValueError(
            f"{where} has a trunk of embed_dim {embed_dim} and stages {list(stages)}, which is no "
            "published SAM 2; put its sam2_config.json beside it"
        )


_SMALL = Sam2Config(
    embed_dim=96,
    num_heads=1,
    stages=(1, 2, 11, 2),
    global_att_blocks=(7, 10, 13),
    window_spec=(8, 4, 14, 7),
)
# SAM 2 and SAM 2.1 share these; their image models differ in weights only.
PRESETS = {
    "tiny": dataclasses.replace(_SMALL, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9)),
    "small": _SMALL,
    "base_plus": dataclasses.replace(
        _SMALL,
        embed_dim=112,
        num_heads=2,
        stages=(2, 3, 16, 3),
        global_att_blocks=(12, 16, 20),
        window_pos_embed_bkg_spatial_size=(14, 14),
    ),
    "large": Sam2Config(),
}

SAM_PRESETS = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(
        embed_dim=1024,
        depth=24,
        num_heads=16,
        global_attn_indexes=(5, 11, 17, 23),
        mlp_dim=4096,
    ),
    "vit_h": SamConfig(
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_attn_indexes=(7, 15, 23, 31),
        mlp_dim=5120,
    ),
}
