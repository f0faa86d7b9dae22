"""lens_config.json, as the shapes of LENS."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.model_configs.sam import read_sam
from lens_jax.model_configs.sections import TypedKeys
from lens_jax.models.lens import LensConfig


def read_lens(config: Mapping[str, Any]) -> LensConfig:
    """Reads lens_config.json's `mllm` (a Hugging Face config), `sam` and context fields.

    Raises:
        ValueError: a value is wrong; the message names the key.
        KeyError: a key is missing.
    """
    for part in ("mllm", "sam"):
        if not isinstance(config[part], Mapping):
            raise ValueError(f"{part}: expected an object, found {config[part]!r}")
    try:
        sam = read_sam(config["sam"])
    except (AttributeError, TypeError) as error:
        raise ValueError(f"sam: a section has another form than expected ({error})") from None
    except ValueError as error:
        raise ValueError(f"sam: {error}") from None
    fields = {f.name for f in dataclasses.fields(LensConfig)} - {"mllm", "sam"}
    given = TypedKeys({k: v for k, v in config.items() if k in fields}, "LENS")
    numbers = given.keys() - {"context_positions"}
    return LensConfig(
        mllm=read_qwen_vl(config["mllm"]),
        sam=sam,
        **{key: given.whole(key) if key in numbers else given[key] for key in given},
    )
