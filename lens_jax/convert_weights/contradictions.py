"""A configuration file against the tensors it stands beside: what one of them says otherwise.

A config.json of another size makes every tensor misshapen; one line that names its key says more
than a thousand that name tensors. Only what several tensors agree on counts: one that is broken
alone is named by the weight table.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lens_jax.convert_weights.table import Shape, WeightsError
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.sam.config import Sam2Config, SamConfig

# A key of a configuration file, its value there, and what the tensors have.
Finding = tuple[str, object, object]


def check_mllm(file: Path, config: QwenVLConfig, shapes: Mapping[str, Shape]) -> None:
    """Raises WeightsError, a line for each key of config.json that official tensors contradict."""
    _refuse(file, _mllm(config, shapes))


def check_sam(file: Path, config: SamConfig | Sam2Config, shapes: Mapping[str, Shape]) -> None:
    """The same for SAM's image encoder, under its original names."""
    if isinstance(config, SamConfig):
        _refuse(file, _sam1(config, shapes))
    else:
        _refuse(file, _sam2(config, shapes, file.name == "config.json"))


def _refuse(file: Path, findings: Iterator[Finding]) -> None:
    errors = [
        f"{file}: {key} is {said}, but the weights have {found}: one of them is another model's"
        for key, said, found in findings
        if found is not None and said != found
    ]
    if errors:
        raise WeightsError(*errors)


def _mllm(config: QwenVLConfig, shapes: Mapping[str, Shape]) -> Iterator[Finding]:
    vision = config.vision
    towers = {"qwen2_5_vl": "mlp.gate_proj.weight", "qwen2_vl": "mlp.fc1.weight"}
    names = {"qwen2_5_vl": "that of Qwen2.5-VL", "qwen2_vl": "that of Qwen2-VL"}
    found = [family for family, mlp in towers.items() if f"visual.blocks.0.{mlp}" in shapes]
    if len(found) == 1 and found[0] != vision.family:
        yield "vision_config", names[vision.family], names[found[0]]
        return
    layer, mlp = "model.layers.0", "model.layers.0.mlp"
    width = _agreed(shapes, "model.norm.weight", f"{layer}.input_layernorm.weight")
    yield "hidden_size", config.hidden_size, width
    yield "num_hidden_layers", config.num_layers, _count(shapes, r"model\.layers\.(\d+)\.")
    hidden = _agreed(shapes, f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    yield "intermediate_size", config.intermediate_size, hidden
    attention = f"{layer}.self_attn"
    rows = _agreed(shapes, f"{attention}.k_proj.weight", f"{attention}.v_proj.weight")
    said = config.num_kv_heads * config.head_dim
    yield "hidden_size / num_attention_heads * num_key_value_heads", said, rows

    is_old = vision.family == "qwen2_vl"
    block = "visual.blocks.0"
    yield "vision_config.depth", vision.depth, _count(shapes, r"visual\.blocks\.(\d+)\.")
    width = _agreed(shapes, "visual.merger.ln_q.weight", f"{block}.norm1.weight")
    yield f"vision_config.{'embed_dim' if is_old else 'hidden_size'}", vision.hidden_size, width
    if is_old:
        hidden = _agreed(shapes, f"{block}.mlp.fc1.weight", f"{block}.mlp.fc1.bias")
        ratio = hidden and hidden / vision.hidden_size
        yield "vision_config.mlp_ratio", vision.intermediate_size / vision.hidden_size, ratio
    else:
        hidden = _agreed(shapes, f"{block}.mlp.gate_proj.weight", f"{block}.mlp.up_proj.bias")
        yield "vision_config.intermediate_size", vision.intermediate_size, hidden


def _sam2(
    config: Sam2Config, shapes: Mapping[str, Shape], is_hugging_face: bool
) -> Iterator[Finding]:
    trunk = "image_encoder.trunk"
    width, stages = "trunk.embed_dim", "trunk.stages"
    if is_hugging_face:
        section = "vision_config.backbone_config"
        width, stages = f"{section}.hidden_size", f"{section}.blocks_per_stage"
    found = _agreed(shapes, f"{trunk}.patch_embed.proj.weight", f"{trunk}.patch_embed.proj.bias")
    yield width, config.embed_dim, found
    blocks = _count(shapes, r"image_encoder\.trunk\.blocks\.(\d+)\.")
    yield f"the sum of {stages}", sum(config.stages), blocks


def _sam1(config: SamConfig, shapes: Mapping[str, Shape]) -> Iterator[Finding]:
    name = "image_encoder"
    width = _agreed(shapes, f"{name}.pos_embed", f"{name}.blocks.0.norm1.weight", axis=-1)
    yield "vision_config.hidden_size", config.embed_dim, width
    blocks = _count(shapes, r"image_encoder\.blocks\.(\d+)\.")
    yield "vision_config.num_hidden_layers", config.depth, blocks


def _agreed(shapes: Mapping[str, Shape], *names: str, axis: int = 0) -> int | None:
    """The length that all these tensors have along an axis, None if they do not agree."""
    lengths = {shapes[name][axis] if shapes.get(name) else None for name in names}
    return lengths.pop() if len(lengths) == 1 else None


def _count(shapes: Mapping[str, Shape], pattern: str) -> int | None:
    """Blocks by their highest number, None if there are none."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers) + 1 if numbers else None
