"""Files beside official weights: tokenizer, processor and generation settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_jax import checkpoints
from lens_jax.convert_weights.table import WeightsError
from lens_jax.data import processor_files, prompts
from lens_jax.files import blaming, read_json
from lens_jax.model_configs.qwen_vl import read_qwen_vl


def check(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what loading the checkpoint would refuse in the files beside the
    weights, and WeightsError where they contradict each other.

    Of those that are not there, `missing` speaks.
    """
    with blaming(directory / "config.json"):
        processor_files.check_patches(config["mllm"].get("vision_config") or {})
        shapes = read_qwen_vl(config["mllm"])
    if processor_files.has_images(directory):
        processor_files.read_images(directory)
    if (directory / processor_files.GENERATION).is_file():
        processor_files.read_generation(directory, shapes.vocab_size)
    if processor_files.has_tokenizer(directory):
        tokenizer, file = processor_files.read_tokenizer(directory)
        with blaming(directory / checkpoints.CONFIG):
            templates = prompts.Templates.from_dict(config.get("prompts", {}))
        with blaming(file):
            encoder = prompts.PromptTokenizer(tokenizer, templates)
        asked, found = shapes.image_token_id, encoder.image_token_id
        if asked != found:
            levels = (config["mllm"], config["mllm"].get("text_config") or {})
            is_given = any(level.get("image_token_id") is not None for level in levels)
            default = "" if is_given else " where the file does not say"
            raise WeightsError(
                f"{directory / 'config.json'}: image_token_id is {asked}{default}, but the "
                f"tokenizer's {prompts.IMAGE_TOKEN} is {found}"
            )
        tokens = tokenizer.get_vocab() | _added_tokens(directory)
        token, last = max(tokens.items(), key=lambda item: item[1])
        if last >= shapes.vocab_size:
            raise WeightsError(
                f"{directory / processor_files.TOKENIZER}: the token {token!r} is number "
                f"{last}, but vocab_size in config.json is {shapes.vocab_size}: one of them is "
                "another model's"
            )


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens that tokenizer.json adds, those included that transformers leaves out on loading."""
    file = directory / processor_files.TOKENIZER
    added = read_json(file).get("added_tokens") if file.is_file() else None
    return {str(token["content"]): token["id"] for token in added or ()}


def missing(directory: Path) -> list[Path]:
    """Files that a checkpoint cannot be used without, and that are not there to be copied."""
    found = {
        processor_files.TOKENIZER: processor_files.has_tokenizer(directory),
        processor_files.GENERATION: (directory / processor_files.GENERATION).is_file(),
        processor_files.PREPROCESSOR: processor_files.has_images(directory),
    }
    return [directory / name for name, is_there in found.items() if not is_there]
