"""The weight table of SAM 2: original names, as in Meta's files and in LENS checkpoints."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lens_jax.convert_weights.sam_parts import (
    mask_decoder,
    mlp,
    norm,
    path,
    prompt_encoder,
    with_bias,
)
from lens_jax.convert_weights.table import (
    CHANNELS_LAST,
    CONV2D,
    SQUEEZE,
    Entry,
    Table,
    chain,
    flattened_conv,
    params_from,
    tensors_from,
)
from lens_jax.models.sam.config import HF_MASK_DECODER, PRESETS, Sam2Config, read_sections

# Regular tensors of the original model that a single picture never needs.
CARRIED_NAMES = (
    "mask_downsample.weight",
    "mask_downsample.bias",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    *(f"obj_ptr_proj.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
    "obj_ptr_tpos_proj.weight",
    "obj_ptr_tpos_proj.bias",
)
CARRIED = tuple(map(re.escape, CARRIED_NAMES))
CONFIG_FILE = "sam2_config.json"  # our own, beside the weights
# The memory of video, which LENS takes out of the model but not out of its checkpoints.
JUNK = (r"memory_attention\..+", r"memory_encoder\..+", r"maskmem_tpos_enc")

_MAP = chain(CHANNELS_LAST, SQUEEZE)  # (1, C, h, w) -> (h, w, C)


def _image_encoder(config: Sam2Config) -> Iterator[Entry]:
    trunk = "image_encoder.trunk"
    yield from with_bias(f"{trunk}.patch_embed.proj", path(f"{trunk}.patch_embed.proj"), CONV2D)
    yield Entry(f"{trunk}.pos_embed", path(f"{trunk}.pos_embed"), _MAP)
    yield Entry(f"{trunk}.pos_embed_window", path(f"{trunk}.pos_embed_window"), _MAP)
    first_blocks = [sum(config.stages[:stage]) for stage in range(1, len(config.stages))]
    for i in range(sum(config.stages)):
        block = f"{trunk}.blocks.{i}"
        for kind in ("norm1", "norm2"):
            yield from norm(f"{block}.{kind}", path(f"{block}.{kind}"))
        linears = ["attn.qkv", "attn.proj"] + (["proj"] if i in first_blocks else [])
        for linear in linears:
            yield from with_bias(f"{block}.{linear}", path(f"{block}.{linear}"))
        yield from mlp(f"{block}.mlp", 2)
    for i, dim in enumerate(config.stage_dims[::-1]):
        name = f"image_encoder.neck.convs.{i}"
        yield from with_bias(f"{name}.conv", path(name), flattened_conv(dim, 1, 1))


def table(config: Sam2Config) -> Table:
    """Original name -> `sam/...` on our disk, for every parameter of `Sam2(config)`."""
    entries = (
        *_image_encoder(config),
        *prompt_encoder(),
        *mask_decoder(config),
        Entry("no_mem_embed", "no_mem_embed", chain(SQUEEZE, SQUEEZE)),
    )
    return Table(
        tuple(Entry(e.source, f"sam/{e.target}", e.transform) for e in entries), CARRIED, JUNK
    )


# Original fragment -> the one in Hugging Face's Sam2Model, applied in this order.
_HF_FRAGMENTS = (
    ("image_encoder.trunk.", "vision_encoder.backbone."),
    ("image_encoder.neck.", "vision_encoder.neck."),
    (".conv.", "."),
    ("patch_embed.proj.", "patch_embed.projection."),
    ("sam_prompt_encoder.pe_layer.", "prompt_encoder.shared_embedding."),
    ("positional_encoding_gaussian_matrix", "positional_embedding"),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    ("out_proj.", "o_proj."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    (".norm", ".layer_norm"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("obj_ptr_proj.", "object_pointer_proj."),
    ("obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer."),
)
# Hugging Face keeps the random matrix of positions twice, under these names.
HF_MATRIX = "prompt_encoder.shared_embedding.positional_embedding"
HF_MATRIX_AGAIN = "shared_image_embedding.positional_embedding"
HF_JUNK = (r"memory_.+",)


def hf_source(config: Sam2Config, source: str) -> tuple[str, int | None]:
    """Where Hugging Face's SAM 2 keeps an original tensor: its name, and its row if stacked.

    Carried tensors are those of Sam2VideoModel, which Sam2Model passes over. The four point
    embeddings are rows of one tensor there; everything else is only renamed.
    """
    points = "sam_prompt_encoder.point_embeddings."
    if source.startswith(points):
        return "prompt_encoder.point_embed.weight", int(source.removeprefix(points).split(".")[0])
    name = source
    for original, renamed in _HF_FRAGMENTS:
        name = name.replace(original, renamed)
    mlp = re.fullmatch(r"(.+\.mlp|.+_head|.+_mlps\.\d+|\w+_proj)\.layers\.(\d+)\.(\w+)", name)
    if mlp is None:
        return name, None
    # The first and the last layer have names of their own there, those between are `layers`.
    head, index, rest = mlp[1], int(mlp[2]), mlp[3]
    depth = 2 if head.endswith(".mlp") else 3
    if head.endswith("iou_prediction_head"):
        depth = config.iou_head_depth
    if index == 0:
        return f"{head}.proj_in.{rest}", None
    if index == depth - 1:
        return f"{head}.proj_out.{rest}", None
    return f"{head}.layers.{index - 1}.{rest}", None


def original_encoder_name(name: str) -> str:
    """A name of Hugging Face's trunk as the original, as far as it tells the size."""
    prefix = "vision_encoder.backbone."
    if not name.startswith(prefix):
        return name
    rest = name.removeprefix(prefix).replace("embed.projection.", "embed.proj.")
    return "image_encoder.trunk." + rest.replace(".layer_norm", ".norm")


def hf_config(config: Sam2Config) -> dict[str, Any]:
    """config.json of Hugging Face's Sam2Model."""
    stages = len(config.stages)
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": config.embed_dim,
                "num_attention_heads": config.num_heads,
                "image_size": [config.image_size] * 2,
                "window_positional_embedding_background_size": list(
                    config.window_pos_embed_bkg_spatial_size
                ),
                "num_query_pool_stages": stages - 1,
                "blocks_per_stage": list(config.stages),
                "embed_dim_per_stage": list(config.stage_dims),
                "num_attention_heads_per_stage": [config.num_heads * 2**i for i in range(stages)],
                "window_size_per_stage": list(config.window_spec),
                "global_attention_blocks": list(config.global_att_blocks),
            },
            "backbone_channel_list": list(config.stage_dims[::-1]),
            "backbone_feature_sizes": config.to_dict()["feature_sizes"],
            "fpn_hidden_size": config.d_model,
            "fpn_top_down_levels": list(config.fpn_top_down_levels),
            "num_feature_levels": stages - config.scalp,
        },
        "prompt_encoder_config": {
            "hidden_size": config.d_model,
            "image_size": config.image_size,
            "patch_size": 16,
        },
        "mask_decoder_config": {
            "hidden_size": config.d_model,
            "mlp_dim": config.decoder_mlp_dim,
            "num_hidden_layers": config.decoder_depth,
            "num_attention_heads": config.decoder_heads,
            "attention_downsample_rate": config.attention_downsample_rate,
            "num_multimask_outputs": config.num_multimask_outputs,
            "iou_head_depth": config.iou_head_depth,
            "iou_head_hidden_dim": config.iou_head_hidden_dim,
            "dynamic_multimask_via_stability": True,
            "dynamic_multimask_stability_delta": config.stability_delta,
            "dynamic_multimask_stability_thresh": config.stability_thresh,
        },
    }


# Sections and keys of Hugging Face's Sam2Config and Sam2VideoConfig -> our fields, and what this
# port takes for granted.
_BACKBONE = "vision_config.backbone_config"
_HF_FIELDS = {
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
    "prompt_encoder_config": {"hidden_size": "d_model", "image_size": "image_size"},
    "mask_decoder_config": HF_MASK_DECODER
    | {
        "dynamic_multimask_stability_delta": "stability_delta",
        "dynamic_multimask_stability_thresh": "stability_thresh",
    },
}
_HF_FIXED = {
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
        "patch_size": 16,
        "mask_input_channels": 16,
        "num_point_embeddings": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "scale": 1,
    },
    "mask_decoder_config": {"hidden_act": "gelu", "dynamic_multimask_via_stability": True},
}
_HF_MODEL_TYPES = ("sam2", "sam2_video")


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> Sam2Config:
    """Reads config.json of Hugging Face's Sam2Model or Sam2VideoModel.

    Keys that a file leaves out have Hugging Face's default, which is the tiny model's.

    Raises:
      KeyError: a section is missing.
      ValueError: another model, a switch that this port does not have, contradicting shapes.
    """
    if hf.get("model_type", "sam2") not in _HF_MODEL_TYPES:
        raise ValueError(
            f"{where}: model_type {hf['model_type']!r} is none of {', '.join(_HF_MODEL_TYPES)}"
        )
    vision = hf["vision_config"]
    backbone = dict(vision["backbone_config"])
    sides = backbone.get("image_size")
    if isinstance(sides, list):
        if len(set(sides)) != 1:
            raise ValueError(f"{where}: {_BACKBONE}.image_size = {sides} is no square")
        backbone["image_size"] = sides[0]
    # The model goes by the heads of each stage; published files leave the number beside at 1.
    heads = backbone.get("num_attention_heads_per_stage")
    if heads:
        backbone["num_attention_heads"] = heads[0]
    sections = {**hf, "vision_config": {**vision, "backbone_config": backbone}}
    fields = read_sections(sections, _HF_FIELDS, _HF_FIXED, PRESETS["tiny"], where)
    config = Sam2Config(**fields)
    stages = range(len(config.stages))
    cells = config.to_dict()["feature_sizes"]
    follows = {
        f"{_BACKBONE}.num_query_pool_stages": len(config.stages) - 1,
        f"{_BACKBONE}.embed_dim_per_stage": list(config.stage_dims),
        f"{_BACKBONE}.num_attention_heads_per_stage": [config.num_heads * 2**i for i in stages],
        "vision_config.backbone_channel_list": list(config.stage_dims[::-1]),
        "vision_config.backbone_feature_sizes": cells,
    }
    for name, expected in follows.items():
        section, _, key = name.rpartition(".")
        value = (backbone if section == _BACKBONE else vision).get(key)
        if value is not None and value != expected:
            raise ValueError(
                f"{where}: {name} = {value}, but the rest of the file asks for {expected}"
            )
    return config


def params_from_tensors(
    config: Sam2Config, tensors: Mapping[str, np.ndarray], prefix: str = ""
) -> dict[str, Any]:
    """Original tensors in memory as the nested parameters of `Sam2(config)`."""
    return params_from(table(config), tensors, prefix)


def tensors_from_params(config: Sam2Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `params_from_tensors`."""
    return tensors_from(table(config), params)
