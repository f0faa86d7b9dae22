"""SAM's configuration files: Hugging Face's of SAM 1 and of SAM 2, and our own beside weights.

Our own is sam_config.json for SAM 1, in Hugging Face's form, and sam2_config.json for SAM 2, with
the sections `trunk`, `neck` and `decoder` of the original. lens_config.json holds one of these.
Each form is a table from its sections and keys to fields of ours, which serves both directions.
"""

from collections.abc import Mapping
from typing import Any

from lens_jax.model_configs.sections import (
    check_derived,
    read_sections,
    write_sections,
)
from lens_jax.models.sam.config import PATCH, PRESETS, Sam2Config, SamConfig

# --- Hugging Face's SamConfig, and what this port takes for granted -------------------------------

_HF_PROMPT_ENCODER = {"image_size": "image_size", "hidden_size": "d_model"}
_HF_MASK_DECODER = {
    "hidden_size": "d_model",
    "num_hidden_layers": "decoder_depth",
    "num_attention_heads": "decoder_heads",
    "mlp_dim": "decoder_mlp_dim",
    "attention_downsample_rate": "attention_downsample_rate",
    "num_multimask_outputs": "num_multimask_outputs",
    "iou_head_depth": "iou_head_depth",
    "iou_head_hidden_dim": "iou_head_hidden_dim",
}
_SAM1_FIELDS = {
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
    "prompt_encoder_config": _HF_PROMPT_ENCODER,
    "mask_decoder_config": _HF_MASK_DECODER,
}
_SAM1_FIXED = {
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


def read_sam1(config: Mapping[str, Any]) -> SamConfig:
    """Reads the form of Hugging Face's SamConfig, where what is not said is as in ViT-B.

    `layer_norm_eps` of mask_decoder_config is passed over: Hugging Face's published files say
    1e-6, where Meta's code, and ours, have 1e-5.

    Raises:
      ValueError: on a switch that this port does not have, or contradicting shapes.
      KeyError: without a vision_config.
    """
    if config.get("model_type", "sam") != "sam":
        raise ValueError(f"model_type {config['model_type']!r} is not that of SAM 1")
    vision = config["vision_config"]
    if vision.get("mlp_dim") is None:
        width = vision.get("hidden_size", SamConfig.embed_dim)
        vision = {**vision, "mlp_dim": int(width * vision.get("mlp_ratio", 4))}
    sections = {**config, "vision_config": vision}
    return SamConfig(**read_sections(sections, _SAM1_FIELDS, _SAM1_FIXED, SamConfig()))


def write_sam1(config: SamConfig) -> dict[str, Any]:
    """The form that `read_sam1` and transformers read, with `image_size` in front."""
    sections = write_sections(config, _SAM1_FIELDS, _SAM1_FIXED)
    sections["vision_config"]["num_pos_feats"] = config.d_model // 2
    sections["mask_decoder_config"]["layer_norm_eps"] = 1e-5
    return {"model_type": "sam", "image_size": config.image_size, **sections}


def write_hf_sam1(config: SamConfig) -> dict[str, Any]:
    """config.json of Hugging Face's SamModel."""
    return {"architectures": ["SamModel"]} | write_sam1(config)


# --- sam2_config.json -----------------------------------------------------------------------------

_TRUNK = (
    "embed_dim",
    "num_heads",
    "stages",
    "global_att_blocks",
    "window_pos_embed_bkg_spatial_size",
    "window_spec",
)
_SAM2_FIELDS = {
    "": {
        "image_size": "image_size",
        "scalp": "scalp",
        "directly_add_no_mem_embed": "directly_add_no_mem_embed",
        "dynamic_multimask_stability_delta": "stability_delta",
        "dynamic_multimask_stability_thresh": "stability_thresh",
    },
    "trunk": {field: field for field in _TRUNK},
    "neck": {"d_model": "d_model", "fpn_top_down_levels": "fpn_top_down_levels"},
    "decoder": {
        "transformer_dim": "d_model",
        "depth": "decoder_depth",
        "heads": "decoder_heads",
        "mlp_dim": "decoder_mlp_dim",
        "attention_downsample_rate": "attention_downsample_rate",
        "num_multimask_outputs": "num_multimask_outputs",
        "iou_head_depth": "iou_head_depth",
        "iou_head_hidden_dim": "iou_head_hidden_dim",
    },
}
# What every published SAM 2 does and this port takes for granted.
_SAM2_FIXED = {
    "": {
        "use_high_res_features_in_sam": True,
        "pred_obj_scores": True,
        "pred_obj_scores_mlp": True,
        "iou_prediction_use_sigmoid": True,
        "dynamic_multimask_via_stability": True,
    },
    "neck": {"fpn_interp_model": "nearest"},
}


def read_sam2(config: Mapping[str, Any]) -> Sam2Config:
    """Reads the nested form with the keys `trunk`, `neck` and `decoder`.

    Raises:
      ValueError: on a switch that this port does not have, or contradicting shapes.
      KeyError: on a missing key.
    """
    published = {
        "dynamic_multimask_stability_delta": Sam2Config.stability_delta,
        "dynamic_multimask_stability_thresh": Sam2Config.stability_thresh,
    }
    fields = read_sections({**published, **config}, _SAM2_FIELDS, _SAM2_FIXED, None)
    result = Sam2Config(**fields)
    channels = {"neck.backbone_channel_list": list(result.stage_dims[::-1])}
    check_derived(config, channels)
    return result


def write_sam2(config: Sam2Config) -> dict[str, Any]:
    """The nested form that `read_sam2` reads."""
    sections = write_sections(config, _SAM2_FIELDS, _SAM2_FIXED)
    sections["neck"]["backbone_channel_list"] = list(config.stage_dims[::-1])
    sections["feature_sizes"] = _feature_sizes(config)
    sections["low_res_mask_size"] = [config.mask_size] * 2
    return sections


def _feature_sizes(config: Sam2Config) -> list[list[int]]:
    """Height and width of each feature level in cells, finest first."""
    return [[config.embedding_size * 2**level] * 2 for level in (2, 1, 0)]


# --- Hugging Face's Sam2Config and Sam2VideoConfig ------------------------------------------------

_BACKBONE = "vision_config.backbone_config"
_HF_SAM2_FIELDS = {
    "": {"image_size": "image_size"},
    _BACKBONE: {
        "image_size": "image_size",
        "hidden_size": "embed_dim",
        "num_attention_heads": "num_heads",
        "blocks_per_stage": "stages",
        "global_attention_blocks": "global_att_blocks",
        "window_positional_embedding_background_size": "window_pos_embed_bkg_spatial_size",
        "window_size_per_stage": "window_spec",
    },
    "vision_config": {"fpn_hidden_size": "d_model", "fpn_top_down_levels": "fpn_top_down_levels"},
    "prompt_encoder_config": _HF_PROMPT_ENCODER,
    "mask_decoder_config": _HF_MASK_DECODER
    | {
        "dynamic_multimask_stability_delta": "stability_delta",
        "dynamic_multimask_stability_thresh": "stability_thresh",
    },
}
_HF_SAM2_FIXED = {
    _BACKBONE: {
        "num_channels": 3,
        "patch_kernel_size": [7, 7],
        "patch_stride": [4, 4],
        "patch_padding": [3, 3],
        "query_stride": [2, 2],
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "vision_config": {
        "fpn_kernel_size": 1,
        "fpn_stride": 1,
        "fpn_padding": 0,
        "num_feature_levels": 3,
    },
    "prompt_encoder_config": {
        "patch_size": PATCH,
        "mask_input_channels": 16,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "scale": 1,
    },
    "mask_decoder_config": {"hidden_act": "gelu", "dynamic_multimask_via_stability": True},
}
_HF_SAM2_TYPES = ("sam2", "sam2_video")


def read_hf_sam2(hf: Mapping[str, Any]) -> Sam2Config:
    """Reads config.json of Hugging Face's Sam2Model or Sam2VideoModel.

    Keys that a file leaves out have Hugging Face's default, which is the tiny model's.

    Raises:
      KeyError: a section is missing.
      ValueError: another model, a switch that this port does not have, contradicting shapes.
    """
    if hf.get("model_type", "sam2") not in _HF_SAM2_TYPES:
        raise ValueError(f"model_type {hf['model_type']!r} is none of {', '.join(_HF_SAM2_TYPES)}")
    vision = hf["vision_config"]
    backbone = dict(vision["backbone_config"])
    sides = backbone.get("image_size")
    if isinstance(sides, list):
        if len(set(sides)) != 1:
            raise ValueError(f"{_BACKBONE}.image_size = {sides} is no square")
        backbone["image_size"] = sides[0]
    # The model goes by the heads of each stage; published files leave the number beside at 1.
    heads = backbone.get("num_attention_heads_per_stage")
    if heads:
        backbone["num_attention_heads"] = heads[0]
    sections = {**hf, "vision_config": {**vision, "backbone_config": backbone}}
    fields = read_sections(sections, _HF_SAM2_FIELDS, _HF_SAM2_FIXED, PRESETS["tiny"])
    config = Sam2Config(**fields)
    check_derived(sections, _hf_derived(config))
    return config


def _hf_derived(config: Sam2Config) -> dict[str, Any]:
    """Keys of Hugging Face's that follow from others."""
    stages = len(config.stages)
    return {
        f"{_BACKBONE}.num_query_pool_stages": stages - 1,
        f"{_BACKBONE}.embed_dim_per_stage": list(config.stage_dims),
        f"{_BACKBONE}.num_attention_heads_per_stage": [
            config.num_heads * 2**i for i in range(stages)
        ],
        "vision_config.backbone_channel_list": list(config.stage_dims[::-1]),
        "vision_config.backbone_feature_sizes": _feature_sizes(config),
    }


def write_hf_sam2(config: Sam2Config) -> dict[str, Any]:
    """config.json of Hugging Face's Sam2Model."""
    more: dict[str, dict[str, Any]] = {
        "": {"architectures": ["Sam2Model"], "model_type": "sam2"},
        _BACKBONE: {
            "model_type": "sam2_hiera_det_model",
            "image_size": [config.image_size] * 2,
        },
        "vision_config": {
            "model_type": "sam2_vision_model",
            "num_feature_levels": len(config.stages) - config.scalp,
        },
        "prompt_encoder_config": {"patch_size": PATCH},
        "mask_decoder_config": {"dynamic_multimask_via_stability": True},
    }
    for path, value in _hf_derived(config).items():
        section, _, key = path.rpartition(".")
        more[section][key] = value
    sections = write_sections(config, _HF_SAM2_FIELDS, more)
    del sections["image_size"]  # of Sam2VideoConfig alone
    return sections


# --- either family --------------------------------------------------------------------------------


def read_sam(config: Mapping[str, Any]) -> SamConfig | Sam2Config:
    """Reads our own form of either family by its `model_type`; without one it is SAM 2.

    Raises:
      ValueError: another family, a switch that this port does not have, contradicting shapes.
      KeyError: on a missing key.
    """
    families = {"sam": read_sam1, "sam2": read_sam2}
    family = config.get("model_type", "sam2")
    if family not in families:
        raise ValueError(f"model_type {family!r} is none of {', '.join(families)}")
    return families[family](config)


def write_sam(config: SamConfig | Sam2Config) -> dict[str, Any]:
    """Our own form of either family."""
    return write_sam1(config) if isinstance(config, SamConfig) else write_sam2(config)
