"""Tokenizer, chat template and picture settings, read from files in Hugging Face's forms.

Conversion reads a model's release with it and loading a checkpoint of ours: what one refuses, the
other does.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lens_jax.data import prompts
from lens_jax.files import CheckpointError

JINJA, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: not a pretrained checkpoint") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


@contextlib.contextmanager
def blaming(file: Path) -> Iterator[None]:
    """A ValueError, TypeError or KeyError in here is one of what the file says, and names it."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file}: the key {error} is missing") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_tokenizer(directory: Path) -> tuple[Any, Path]:
    """The tokenizer of a directory with the chat template for pictures, and that one's file.

    Raises:
        FileNotFoundError: there is no tokenizer.
        CheckpointError: it cannot be read or is of another kind, or there is no chat template.
    """
    tokenizer = _tokenizer(directory)
    tokenizer.chat_template, file = _chat_template(directory, tokenizer)
    return tokenizer, file


def _tokenizer(directory: Path) -> Any:
    file = directory / TOKENIZER
    if not file.is_file():
        slow = [directory / name for name in ("vocab.json", "merges.txt")]
        if not all(part.is_file() for part in slow):
            raise FileNotFoundError(f"{file} is missing: not a pretrained checkpoint")
        file = slow[0]
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the libraries raise nearly anything on a broken file
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: transformers cannot read the tokenizer: {reason}") from None
    if not tokenizer.is_fast or tokenizer.convert_tokens_to_string(["Ġ"]) != " ":
        raise CheckpointError(
            f"{file}: {type(tokenizer).__name__} is no byte-level BPE tokenizer: use one of the "
            "Qwen family"
        )
    if tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        raise CheckpointError(f"{file}: the tokenizer has no token {prompts.IMAGE_TOKEN}")
    return tokenizer


def _chat_template(directory: Path, tokenizer: Any) -> tuple[str, Path]:
    """The template for pictures, and the file it stands in.

    The processor's comes first, the tokenizer's last: that of the published Qwen2.5-VL knows texts
    alone.
    """
    file = directory / JINJA
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError:
            raise CheckpointError(f"{file} is not UTF-8 text") from None
    file = directory / TEMPLATE_JSON
    template = read_json(file).get("chat_template") if file.is_file() else None
    if template is None:
        file = directory / TOKENIZER_CONFIG
        template = tokenizer.chat_template
    if isinstance(template, list):  # of {"name": ..., "template": ...}
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{file}: no chat_template, nor is there {JINJA} or {TEMPLATE_JSON}: copy one there "
            "from the model's release"
        )
    return template, file
