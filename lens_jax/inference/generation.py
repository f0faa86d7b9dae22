"""Settings of generation that a pretrained checkpoint holds."""

import dataclasses
from pathlib import Path

from lens_jax import checkpoints
from lens_jax.data import processor_files


@dataclasses.dataclass(frozen=True)
class Generation:
    """End tokens, repetition penalty and limit of greedy decoding (generation_config.json)."""

    end_tokens: tuple[int, ...]
    repetition_penalty: float = 1.0
    max_new_tokens: int = 768

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Generation":
        """Reads a pretrained checkpoint's generation_config.json and lens_config.json."""
        directory = Path(directory)
        config = checkpoints.read_config(directory)
        vocab_size = checkpoints.model_shapes(directory, config).mllm.vocab_size
        settings = processor_files.read_generation(directory, vocab_size)
        limit = config.get("max_new_tokens", cls.max_new_tokens)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise checkpoints.CheckpointError(
                f"{directory / checkpoints.CONFIG}: max_new_tokens: expected a positive whole "
                f"number, found {limit!r}"
            )
        return cls(settings.end_tokens, settings.repetition_penalty, limit)
