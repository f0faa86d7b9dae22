"""Tokenizer, chat template and image settings, read from files in Hugging Face's forms.

Conversion reads a model's release with it and loading a checkpoint of ours: what one refuses, the
other does.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_jax.data import images, prompts
from lens_jax.files import CheckpointError, blaming, given, read_json
from lens_jax.models.geometry import ImageGeometry

log = logging.getLogger("lens_jax")

JINJA, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SLOW_TOKENIZER = ("vocab.json", "merges.txt")
PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
GENERATION = "generation_config.json"

# What our preparation of images does; of a setting that says otherwise, the numbers would differ.
_ONLY = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "rescale_factor": 1 / 255,
    "resample": 3,  # bicubic
}


def has_tokenizer(directory: Path) -> bool:
    """Whether the files of a tokenizer are there, in the newer or the older form."""
    files = [directory / name for name in SLOW_TOKENIZER]
    return (directory / TOKENIZER).is_file() or all(file.is_file() for file in files)


def has_images(directory: Path) -> bool:
    """Whether there are settings of an image processor, in the newer or the older form."""
    return image_processor(directory)[1] is not None


def image_processor(directory: Path) -> tuple[Path, Any]:
    """Settings of the image processor, and the file that they stand in; None where there are none.

    Newer versions of transformers write them inside of processor_config.json, older ones into a
    file of their own.
    """
    file = directory / PROCESSOR
    settings = read_json(file).get("image_processor") if file.is_file() else None
    if settings is None:
        file = directory / PREPROCESSOR
        settings = read_json(file) if file.is_file() else None
    return file, settings


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy it there from the model's release")


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How the language model's image is resized and normalised; limits are in pixels.

    `familiar_aspect_ratio` is a key of ours in the same file: up to this ratio of the longer side
    to the shorter, a model does about as well as on square images. None: on all.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    familiar_aspect_ratio: float | None


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """End tokens of a completion, and the penalty on tokens that it already holds."""

    end_tokens: tuple[int, ...]
    repetition_penalty: float


def read_images(directory: Path) -> ImageSettings:
    """Settings of the image processor. A null is no value; what is left out is as in transformers.

    The official code resizes to at most 1,000,000 pixels whatever the settings allow; a smaller
    limit is honoured. A minimum above it is lowered to it.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: they ask for what is not computed here; it names the file and the key.
    """
    file, settings = image_processor(directory)
    if settings is None:
        _check_there(file)
    with blaming(file):
        return _image_settings(given(settings, "image_processor"))


def _image_settings(settings: Mapping[str, Any]) -> ImageSettings:
    for key, expected in _ONLY.items():
        value = settings.get(key, expected)
        if not isinstance(value, int | float) or not math.isclose(value, expected, rel_tol=1e-6):
            raise ValueError(f"{key} is {value}: only {expected} is supported")
    kind = settings.get("image_processor_type", "Qwen2VLImageProcessor")
    if not str(kind).startswith("Qwen2"):
        raise ValueError(f"image_processor_type is {kind}: only those of Qwen2-VL and Qwen2.5-VL")
    size = given(settings.get("size"), "size")
    for key in ("height", "width"):
        if key in size:
            raise ValueError(f"size: {key} is {size[key]}: only limits of the area are supported")
    limits = []
    for names, default in (
        (("min_pixels", "shortest_edge"), images.MIN_PIXELS),
        (("max_pixels", "longest_edge"), images.MAX_PIXELS),
    ):
        own = [settings[names[0]]] if names[0] in settings else []
        found = own + [size[name] for name in reversed(names) if name in size]
        value = found[0] if found else default
        if not _is_number(value) or value != int(value) or value < 0:
            raise ValueError(f"{names[0]}: expected a whole number of pixels, found {value!r}")
        limits.append(int(value))
    smallest, largest = limits
    if not smallest <= largest:
        raise ValueError(f"min_pixels {smallest} is more than max_pixels {largest}")
    if largest < images.UNIT**2:
        raise ValueError(
            f"max_pixels is {largest}: one token takes {images.UNIT} x {images.UNIT} pixels"
        )
    if smallest > images.MAX_PIXELS:
        log.warning(
            "min_pixels %d is lowered to %d, the most that pictures are resized to",
            smallest,
            images.MAX_PIXELS,
        )
    smallest, largest = (min(limit, images.MAX_PIXELS) for limit in limits)
    mean = settings.get("image_mean", images.MEAN)
    std = settings.get("image_std", images.STD)
    for key, values in (("image_mean", mean), ("image_std", std)):
        is_list = isinstance(values, list | tuple) and len(values) == 3
        if not is_list or not all(map(_is_number, values)):
            raise ValueError(f"{key}: expected three numbers, found {values!r}")
    if min(std) <= 0:
        raise ValueError(f"image_std: expected three numbers above 0, found {list(std)}")
    seen = settings.get("familiar_aspect_ratio")
    if seen is not None and (not _is_number(seen) or seen < 1):
        raise ValueError(f"familiar_aspect_ratio: expected a number of at least 1, found {seen!r}")
    return ImageSettings(smallest, largest, tuple(mean), tuple(std), seen)


def _is_number(value: Any) -> bool:
    """Python's JSON knows NaN and Infinity, too; no setting means them."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def check_patches(vision: Mapping[str, Any]) -> None:
    """Raises ValueError for a vision_config whose patches are not those that images are cut to.

    The vision tower could have others, but no published model has.
    """
    published = ImageGeometry()
    expected = {
        "patch_size": published.patch_size,
        "spatial_merge_size": published.merge_size,
        "temporal_patch_size": published.temporal_patch_size,
    }
    for key, size in expected.items():
        value = vision.get(key)
        if value is not None and value != size:
            raise ValueError(f"vision_config: {key} is {value}: only {size} is supported")


def read_generation(directory: Path, vocab_size: int = 2**31) -> GenerationSettings:
    """End tokens and repetition penalty of generation_config.json.

    Args:
        vocab_size: of the model; it writes tokens below this number.

    Raises:
        CheckpointError: the file is missing, or names no end token or one that the model has not.
    """
    file = directory / GENERATION
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it names the end tokens")
    settings = read_json(file)
    ends = settings.get("eos_token_id")
    if ends is None:
        raise CheckpointError(f"{file}: no eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if not ends or not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise CheckpointError(f"{file}: eos_token_id: expected token ids, found {ends}")
    if strange := [end for end in ends if not 0 <= end < vocab_size]:
        raise CheckpointError(
            f"{file}: eos_token_id is {strange[0]}: the model's tokens are 0 to {vocab_size - 1}"
        )
    penalty = settings.get("repetition_penalty")
    penalty = 1.0 if penalty is None else penalty
    if not _is_number(penalty) or not penalty > 0:
        raise CheckpointError(f"{file}: repetition_penalty: expected a number, found {penalty!r}")
    return GenerationSettings(tuple(ends), float(penalty))


def read_tokenizer(directory: Path) -> tuple[Any, Path]:
    """The tokenizer of a directory with the chat template for images, and that one's file.

    Raises:
        FileNotFoundError: there is no tokenizer.
        CheckpointError: it cannot be read or is of another kind, or there is no chat template.
    """
    tokenizer = _tokenizer(directory)
    tokenizer.chat_template, file = _chat_template(directory, tokenizer)
    return tokenizer, file


def _tokenizer(directory: Path) -> Any:
    # Not above: where PyTorch is installed it is imported, too, which takes seconds.
    from transformers import AutoTokenizer, PretrainedConfig

    file = directory / TOKENIZER
    if not has_tokenizer(directory):
        _check_there(file)
    if not file.is_file():
        file = directory / SLOW_TOKENIZER[0]
    elif not _is_byte_level(read_json(file)):  # transformers may read it as one
        raise CheckpointError(f"{file}: {_OTHER_KIND}")
    try:
        # Without the config.json of a release, which a checkpoint of ours does not have.
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=PretrainedConfig(), trust_remote_code=False
        )
    except Exception as error:  # the libraries raise nearly anything on a broken file
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: transformers cannot read the tokenizer: {reason}") from None
    if not tokenizer.is_fast or not _is_byte_level(
        json.loads(tokenizer.backend_tokenizer.to_str())
    ):
        raise CheckpointError(f"{file}: {_OTHER_KIND}")
    if tokenizer.convert_tokens_to_ids(prompts.IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        raise CheckpointError(f"{file}: the tokenizer has no token {prompts.IMAGE_TOKEN}")
    return tokenizer


_OTHER_KIND = "this is no byte-level BPE tokenizer: use one of the Qwen family"


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether this is a tokenizer.json of a byte-level BPE tokenizer."""
    model, decoder = (content.get(key) or {} for key in ("model", "decoder"))
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        return False
    parts = decoder.get("decoders")
    parts = [decoder, *(parts if isinstance(parts, list) else ())]
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    return model.get("type", "BPE") == "BPE" and "ByteLevel" in kinds


def _chat_template(directory: Path, tokenizer: Any) -> tuple[str, Path]:
    """The template for images, and the file it stands in.

    The processor's comes first, the tokenizer's last: that of the published Qwen2.5-VL knows texts
    alone.
    """
    file = directory / JINJA
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig"), file
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
