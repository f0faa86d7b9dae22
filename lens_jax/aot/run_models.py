"""The shapes and texts of a run's model, with or without its files."""

from pathlib import Path
from typing import Any

from lens_jax import checkpoints
from lens_jax.config import ConfigError, RunConfig
from lens_jax.data import processor_files
from lens_jax.files import blaming, read_json
from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.model_configs.sam import read_sam
from lens_jax.models.lens import LensConfig
from lens_jax.models.qwen_vl import config as qwen_vl
from lens_jax.models.sam import config as sam
from lens_jax.rewards import text_rewards

TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"


def model_shapes(config: RunConfig) -> LensConfig:
    """The shapes of a run's model: from its files, or published by their names."""
    model = config.model
    positions = {"context_positions": model.context_positions} if model.context_positions else {}
    if model.checkpoint and (Path(model.checkpoint) / checkpoints.CONFIG).exists():
        settings = checkpoints.read_config(model.checkpoint) | positions
        return checkpoints.model_shapes(model.checkpoint, settings)
    if not (model.mllm and model.sam):
        raise ConfigError(
            f"model.checkpoint {model.checkpoint} does not exist: name what it was made of as "
            "model.mllm and model.sam to compile without it"
        )
    return LensConfig(
        _mllm_shapes(Path(model.mllm)),
        _sam_shapes(Path(model.sam)),
        num_queries=model.num_queries,
        **positions,
    )


def _mllm_shapes(directory: Path) -> qwen_vl.QwenVLConfig:
    file = directory / "config.json"
    if file.exists():
        with blaming(file):
            return read_qwen_vl(read_json(file))
    if directory.name in qwen_vl.PRESETS:
        return qwen_vl.PRESETS[directory.name]
    raise ConfigError(
        f"model.mllm: {file} does not exist, and shapes are known of "
        f"{', '.join(qwen_vl.PRESETS)} alone"
    )


def _sam_shapes(path: Path) -> sam.SamConfig | sam.Sam2Config:
    folder = path if path.is_dir() else path.parent
    for file in (folder / "sam2_config.json", folder / "sam_config.json"):
        if file.exists():
            with blaming(file):
                return read_sam(read_json(file))
    named = {f"sam_{name}": shapes for name, shapes in sam.SAM_PRESETS.items()}
    for version in ("sam2", "sam2.1"):
        named |= {f"{version}_hiera_{name}": shapes for name, shapes in sam.PRESETS.items()}
    for name, shapes in named.items():
        if path.name.startswith(name):
            return shapes
    raise ConfigError(
        f"model.sam: {folder} holds no sam2_config.json, and by name shapes are known of "
        f"{', '.join(named)} alone"
    )


def texts(config: RunConfig) -> dict[str, Any]:
    """The tokenizer's tables and the settings of generation, as arguments of `list_programs`.

    Without the run's files they are the tiny checkpoint's, whose tables are some megabytes smaller.
    """
    places = [Path(x) for x in (config.model.checkpoint, config.model.mllm, TINY) if x]
    place = next(x for x in places if (x / processor_files.TOKENIZER).exists())
    generation = processor_files.read_generation(place)
    tokenizer, _ = processor_files.read_tokenizer(place)
    with blaming(place / processor_files.TOKENIZER):
        read_text = text_rewards(tokenizer)
    return {
        "read_text": read_text,
        "end_tokens": generation.end_tokens,
        "repetition_penalty": generation.repetition_penalty,
    }
