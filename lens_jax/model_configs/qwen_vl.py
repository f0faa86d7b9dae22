"""Hugging Face's config.json of Qwen2-VL and Qwen2.5-VL, as the shapes of our model."""

from collections.abc import Mapping
from typing import Any

from lens_jax.files import given
from lens_jax.model_configs.sections import TypedKeys
from lens_jax.models.qwen_vl.config import Family, QwenVLConfig, VisionConfig


def read_qwen_vl(hf: Mapping[str, Any]) -> QwenVLConfig:
    """Reads config.json: flat (transformers < 4.52, LENS), with a `text_config`, or both.

    As in transformers, the nested level goes before the flat one, and a null is no value. A
    vision_config or text_config may hold only what is not its class's default, which
    `model_type` names. The embeddings are tied as the outer level says, else the nested one.

    Raises:
        ValueError: a key is missing or holds what is not computed here, or the file describes
            neither family, or two at once; the message names the key.
    """
    top = given(hf, "the file")
    nested = given(top.pop("text_config", None), "text_config")
    vision = given(top.get("vision_config"), "vision_config")
    _check_computed(top, nested, vision)
    _check_agreement(top, nested)
    family = _family(top.get("model_type"), vision)
    published = "model_type" in top
    text = TypedKeys(
        {**(_TEXT_DEFAULTS if published and nested else {}), **top, **nested}, _NAMES[family]
    )
    rope = _rope(top) | _rope(nested)
    if published:
        rope = {"mrope_section": _MROPE_SECTION} | rope
    ids = TypedKeys({**(_IDS if published else {}), **nested, **top}, _NAMES[family])
    config = QwenVLConfig(
        hidden_size=text.whole("hidden_size"),
        intermediate_size=text.whole("intermediate_size"),
        num_layers=text.whole("num_hidden_layers"),
        num_heads=text.whole("num_attention_heads"),
        num_kv_heads=text.whole("num_key_value_heads"),
        vocab_size=text.whole("vocab_size"),
        rope_theta=TypedKeys({**text, **rope}, _NAMES[family]).number("rope_theta"),
        mrope_section=TypedKeys(rope, _NAMES[family]).wholes("mrope_section"),
        rms_norm_eps=text.number("rms_norm_eps"),
        tie_word_embeddings=is_tied(hf),
        image_token_id=ids.whole("image_token_id"),
        vision=_vision(family, vision, text.whole("hidden_size"), published),
    )
    if config.num_heads * config.head_dim != config.hidden_size:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads "
            f"{config.num_heads}"
        )
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
            f"{config.num_kv_heads}"
        )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise ValueError(
            f"mrope_section {list(config.mrope_section)} must add up to half of a head's width "
            f"({config.head_dim} = hidden_size / num_attention_heads)"
        )
    return config


def write_qwen_vl(config: QwenVLConfig) -> dict[str, Any]:
    """These shapes as a config.json of transformers, without model_type: `config.vision.family`."""
    vision = config.vision
    tower: dict[str, Any] = {"depth": vision.depth, "num_heads": vision.num_heads}
    if vision.family == "qwen2_vl":
        tower |= {
            "embed_dim": vision.hidden_size,
            "mlp_ratio": vision.intermediate_size // vision.hidden_size,
            "hidden_size": vision.out_hidden_size,
        }
    else:
        tower |= {
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "out_hidden_size": vision.out_hidden_size,
            "fullatt_block_indexes": list(vision.full_attention_blocks),
            "window_size": vision.window_size,
        }
    return {
        "text_config": {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "vocab_size": config.vocab_size,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": list(config.mrope_section),
                "rope_theta": config.rope_theta,
            },
        },
        "vision_config": tower,
        "image_token_id": config.image_token_id,
        "vision_start_token_id": config.image_token_id - 1,
        "vision_end_token_id": config.image_token_id - 2,
        "video_token_id": config.image_token_id - 3,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def is_tied(hf: Mapping[str, Any]) -> bool:
    """Whether config.json ties the embeddings: by its outer level, else by its text_config."""
    levels = [x for x in tie_levels(hf) if x is not None]
    return levels[0] if levels else False


def tie_levels(hf: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """`tie_word_embeddings` of config.json and of its text_config; None where it is not said."""
    nested = hf.get("text_config")
    levels = [level.get("tie_word_embeddings") for level in (hf, nested or {})]
    for value in levels:
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"tie_word_embeddings: expected true or false, found {value!r}")
    return levels[0], levels[1]


def _rope(level: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary positions on one level; the newer name goes first."""
    found = [given(level.get(key), key) for key in ("rope_scaling", "rope_parameters")]
    return {**found[0], **found[1]}


_NAMES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL"}
# What transformers' classes of both families take where a file says nothing.
_TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
_MROPE_SECTION = (16, 24, 24)
_IDS = {"image_token_id": 151655}
_VISION_DEFAULTS = {"depth": 32, "num_heads": 16}
_FAMILY_VISION_DEFAULTS = {
    "qwen2_vl": {"embed_dim": 1280, "mlp_ratio": 4},
    "qwen2_5_vl": {
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
}
# Keys of vision_config that only one family reads. A Qwen2.5-VL that LENS has saved carries those
# of Qwen2-VL too, at their defaults, for its model_type names the other family's class.
_ONLY_2_5 = ("fullatt_block_indexes", "window_size", "out_hidden_size")
_ONLY_2 = ("embed_dim", "mlp_ratio")

_ROPE_TYPES = ("default", "mrope")
_TRUE_IS_NOT_COMPUTED = ("use_sliding_window", "attention_bias", "mlp_bias")


def _check_computed(
    top: Mapping[str, Any], nested: Mapping[str, Any], vision: Mapping[str, Any]
) -> None:
    """Raises ValueError for a setting under which transformers computes other numbers than we do.

    The bias of queries, keys and values is no setting: both families always have it.
    """
    for level in (top, nested):
        for key in ("quantization_config", "compression_config"):
            if key in level:
                raise ValueError(
                    f"{key}: quantised weights cannot be read; take the release that is not "
                    "quantised"
                )
        for key in _TRUE_IS_NOT_COMPUTED:
            if level.get(key):
                raise ValueError(f"{key} is {level[key]!r}: not supported, only false")
        if others := set(level.get("layer_types", ())) - {"full_attention"}:
            raise ValueError(f"layer_types holds {min(others)}: only full_attention is supported")
        if (activation := level.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act is {activation}: only silu is supported")
        for key in ("rope_scaling", "rope_parameters"):
            rope = given(level.get(key), key)
            for kind in ("rope_type", "type"):
                if rope.get(kind, "default") not in _ROPE_TYPES:
                    raise ValueError(
                        f"{key}: {kind} is {rope[kind]}: only {' and '.join(_ROPE_TYPES)} are "
                        "supported"
                    )
            for name, harmless in (("partial_rotary_factor", 1), ("mrope_interleaved", False)):
                if rope.get(name, harmless) != harmless:
                    raise ValueError(f"{key}: {name} is {rope[name]}: not supported")
    rope = given(vision.get("rope_parameters"), "vision_config: rope_parameters")
    if rope.get("rope_theta", 10000) != 10000 or rope.get("rope_type", "axial") not in (
        "axial",
        *_ROPE_TYPES,
    ):
        raise ValueError(
            f"vision_config: rope_parameters are {rope}: only theta 10000 is supported"
        )


# Values that no weight's shape gives away, so that two that differ would go unnoticed.
_WITHOUT_A_SHAPE = ("num_attention_heads", "rms_norm_eps", "rope_theta", "image_token_id")


def _check_agreement(top: Mapping[str, Any], nested: Mapping[str, Any]) -> None:
    """Raises ValueError where the two levels of a file contradict each other unseen."""
    for level in (top, nested):
        _check_rope_names(level)
    outer, inner = ({**level, **_rope(level)} for level in (top, nested))
    for key in (*_WITHOUT_A_SHAPE, "mrope_section"):
        if key in outer and key in inner and outer[key] != inner[key]:
            raise ValueError(
                f"{key} is {outer[key]}, but {inner[key]} in text_config: which one is right?"
            )
    heads = {**outer, **inner}
    if "head_dim" in heads and isinstance(heads.get("num_attention_heads"), int):
        width = heads["head_dim"] * heads["num_attention_heads"]
        if width != heads.get("hidden_size", width):
            raise ValueError(
                f"head_dim is {heads['head_dim']}: only hidden_size / num_attention_heads is "
                "supported"
            )


def _check_rope_names(level: Mapping[str, Any]) -> None:
    """Raises ValueError where older and newer names of one setting on one level differ."""
    older, newer = (given(level.get(key), key) for key in ("rope_scaling", "rope_parameters"))
    pairs = (
        ("rope_scaling: ", older, "rope_parameters", newer),
        ("", level, "rope_parameters", newer),
        ("", level, "rope_scaling", older),
    )
    for key in ("rope_theta", "mrope_section"):
        for one, first, other, second in pairs:
            if key in first and key in second and first[key] != second[key]:
                raise ValueError(
                    f"{one}{key} is {first[key]}, but {second[key]} in {other}: which one is right?"
                )


def _family(model_type: str | None, vision: Mapping[str, Any]) -> Family:
    """By what vision_config holds: LENS writes model_type qwen2_vl for both families."""
    if model_type not in (None, *_NAMES):
        raise ValueError(f"model_type is {model_type}: only {' and '.join(_NAMES)} are supported")
    if own := [key for key in _ONLY_2_5 if key in vision]:
        if "fullatt_block_indexes" not in vision and model_type != "qwen2_5_vl":
            raise ValueError(
                f"vision_config has {own[0]} but no fullatt_block_indexes: this is not Qwen2.5-VL, "
                "and not Qwen2-VL either"
            )
        return "qwen2_5_vl"
    if model_type is None and not all(key in vision for key in _ONLY_2):
        raise ValueError(
            f"vision_config has neither {' and '.join(_ONLY_2)}, as Qwen2-VL, nor {_ONLY_2_5[0]}, "
            "as Qwen2.5-VL; other models are not supported"
        )
    if model_type == "qwen2_5_vl":
        if any(key in vision for key in _ONLY_2):
            raise ValueError(
                "model_type is qwen2_5_vl, but vision_config is that of Qwen2-VL: it has no "
                f"{_ONLY_2_5[0]}"
            )
        return "qwen2_5_vl"
    return "qwen2_vl"


def _vision(family: Family, given: Mapping[str, Any], width: int, published: bool) -> VisionConfig:
    """The vision tower's shapes; `width` is the language model's.

    Args:
        published: what is not given has the class's default.
    """
    defaults = {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 14}
    defaults |= {"window_size": 112, "in_channels": given.get("in_chans", 3)}
    if published:
        defaults |= _VISION_DEFAULTS | _FAMILY_VISION_DEFAULTS[family]
    vision = TypedKeys({**defaults, **given}, _NAMES[family])
    depth = vision.whole("depth")
    expected = "silu" if family == "qwen2_5_vl" else "quick_gelu"
    if (activation := given.get("hidden_act", expected)) != expected:
        raise ValueError(
            f"vision_config's hidden_act is {activation}, {_NAMES[family]}'s {expected}"
        )
    if family == "qwen2_5_vl":
        own = dict(
            hidden_size=vision.whole("hidden_size"),
            intermediate_size=vision.whole("intermediate_size"),
            # Left out where it is 3584; the weights have the width that they have.
            out_hidden_size=given.get("out_hidden_size", width),
            full_attention_blocks=tuple(
                block for block in vision.wholes("fullatt_block_indexes") if block < depth
            ),
            window_size=vision.whole("window_size"),
        )
    else:
        embed = vision.whole("embed_dim")
        own = dict(
            hidden_size=embed,
            intermediate_size=int(embed * vision.number("mlp_ratio")),
            out_hidden_size=given.get("hidden_size", width),  # as above
            full_attention_blocks=tuple(range(depth)),
        )
    if own["out_hidden_size"] != width:
        raise ValueError(
            f"vision_config's tokens are {own['out_hidden_size']} wide, the language model's "
            f"{width}"
        )
    merged = vision.whole("patch_size") * vision.whole("spatial_merge_size")
    if family == "qwen2_5_vl" and own["window_size"] < merged:
        raise ValueError(
            f"vision_config: window_size is {own['window_size']}: less than one token's {merged} "
            "pixels"
        )
    heads = vision.whole("num_heads")
    if own["hidden_size"] % heads:
        raise ValueError(
            f"vision_config's width {own['hidden_size']} is no multiple of num_heads {heads}"
        )
    return VisionConfig(
        family=family,
        depth=depth,
        num_heads=heads,
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        in_channels=vision.whole("in_channels"),
        merge_size=vision.whole("spatial_merge_size"),
        **own,
    )
