"""config.json of exported models, from what lens_config.json keeps of the one they came with."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.models.qwen_vl.config import QwenVLConfig, VisionConfig

# Official LENS (SAMR1Config) keeps these beside Qwen's own keys.
_LENS_KEYS = ("num_of_query", "if_use_qwen_connector", "if_include_sam")
# Its class is that of Qwen2-VL, whose vision defaults are saved along.
_LENS_VISION_DEFAULTS = {"embed_dim": 1280, "in_channels": 3, "mlp_ratio": 4}

_QWEN_ARCHITECTURE = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
_LENS_ARCHITECTURE = {
    "qwen2_vl": "SAMR1ForConditionalGeneration",
    "qwen2_5_vl": "SAMR1ForConditionalGeneration_qwen2p5",
}


def lens_config(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """The official LENS config.json: flat, as transformers 4.51 reads it.

    Args:
      config: lens_config.json.
      dtype: of the exported language model.
    """
    shapes = read_qwen_vl(config["mllm"])
    hf = dict(config["mllm"])
    text = dict(hf.pop("text_config", None) or {})
    text.pop("model_type", None)  # the outer one decides
    hf |= {key: value for key, value in text.items() if value is not None}
    hf["tie_word_embeddings"] = shapes.tie_word_embeddings
    if rope := hf.pop("rope_parameters", None):
        hf |= _older_rope(rope, shapes)
    family = shapes.vision.family
    vision = _complete(hf, shapes.vision)
    if family == "qwen2_5_vl":
        vision = _LENS_VISION_DEFAULTS | vision
    vision["model_type"] = "qwen2_vl"
    hf.pop("dtype", None)  # transformers 4.51 knows the older name alone
    return _with_dtype(hf, dtype) | {
        "architectures": [_LENS_ARCHITECTURE[family]],
        "model_type": "qwen2_vl",
        "vision_config": vision,
        "num_of_query": config["num_queries"],
        "if_use_qwen_connector": True,
        "if_include_sam": hf.get("if_include_sam", False),
    }


def mllm_config(config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """The config.json of the plain Qwen-VL inside; arguments as for `lens_config`."""
    hf = {key: value for key, value in config["mllm"].items() if key not in _LENS_KEYS}
    shapes = read_qwen_vl(hf)
    family = shapes.vision.family
    vision = _complete(hf, shapes.vision)
    if family == "qwen2_5_vl" and hf.get("model_type") != family:
        # The class that saved an official LENS wrote the other family's defaults, too.
        for key in _LENS_VISION_DEFAULTS.keys() - {"in_channels"}:
            vision.pop(key, None)
    if vision.get("model_type") == "qwen2_vl":
        vision["model_type"] = family
    hf["tie_word_embeddings"] = shapes.tie_word_embeddings  # read on either level, by version
    if rope := hf.get("rope_parameters"):
        hf |= _older_rope(rope, shapes)
    if text := hf.get("text_config"):
        rope = text.get("rope_parameters")
        text = text | (_older_rope(rope, shapes) if rope else {})
        hf["text_config"] = text | {"tie_word_embeddings": shapes.tie_word_embeddings}
    return _with_dtype(hf, dtype) | {
        "architectures": [_QWEN_ARCHITECTURE[family]],
        "model_type": family,
        "vision_config": vision,
    }


def _complete(hf: Mapping[str, Any], shapes: VisionConfig) -> dict[str, Any]:
    """vision_config with what another class than the one that saved it would take differently."""
    vision = {k: v for k, v in (hf.get("vision_config") or {}).items() if v is not None}
    own = {"depth": shapes.depth, "num_heads": shapes.num_heads}
    if shapes.family == "qwen2_5_vl":
        own |= {
            "hidden_size": shapes.hidden_size,
            "intermediate_size": shapes.intermediate_size,
            "out_hidden_size": shapes.out_hidden_size,
            "fullatt_block_indexes": list(shapes.full_attention_blocks),
            "window_size": shapes.window_size,
            "hidden_act": "silu",
        }
    else:
        own |= {"hidden_size": shapes.out_hidden_size}
    return own | vision


def _older_rope(rope: Mapping[str, Any], shapes: QwenVLConfig) -> dict[str, Any]:
    """The keys that transformers before 5 reads in place of rope_parameters."""
    kind = rope.get("rope_type") or "default"
    sections = {"mrope_section": list(shapes.mrope_section), "rope_type": kind, "type": kind}
    return {"rope_theta": shapes.rope_theta, "rope_scaling": sections}


def _with_dtype(hf: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """transformers 5 loads a model in the type that its config.json names: the true one."""
    key = "dtype" if "dtype" in hf else "torch_dtype"
    return {**hf, key: dtype.name}
