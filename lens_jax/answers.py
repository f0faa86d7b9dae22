"""Answers as files: STEM.mask.png, STEM.overlay.png and STEM.json."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools import mask as coco_mask

from lens_jax import files, interrupts
from lens_jax.data.arrays import check_is_file
from lens_jax.data.questions import KEY, MASK, OVERLAY, TEXT, Question, question_of
from lens_jax.inference import Result
from lens_jax.reports import drawing

OURS = {"prompt", "completion", "mask_area", "rle"}  # keys of an answer, new or old
KEYS = OURS | {"image", "box", "ended", "well_formed"}


class TakenError(Exception):
    """An answer that must not or cannot be written; the text names the file and says why."""


def identify(checkpoint: Path, **options: str | bool) -> str:
    """Everything that answers depend on besides the question: configuration, checksums, options."""
    names = ("lens_config.json", "manifest.json")
    content = b"".join(file.read_bytes() for name in names if (file := checkpoint / name).is_file())
    return json.dumps([hashlib.sha256(content).hexdigest(), options], sort_keys=True)


def fingerprint(question: Question, identity: str) -> str:
    """The digest of a question: the image's bytes, the expression and `identity`.

    Raises:
        SampleError: the image is no regular file.
        OSError: it cannot be read.
    """
    check_is_file(question.image)
    with open(question.image, "rb") as file:
        picture = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps([identity, picture, question.prompt]).encode()).hexdigest()


def done(output: Path, question: Question, asked: str) -> dict[str, Any] | None:
    """The answer to the question with the fingerprint `asked`, if all of its files are there.

    An image of the same content may have had another name then: the answer is given the new one.
    """
    mask, overlay, text = _files(output, question)
    if not (overlay.is_file() and question_of(mask) == asked):
        return None
    answer = _read(text)
    if answer is not None and not answer.keys() >= KEYS:
        return None  # of an earlier version: asked again
    if answer is not None and answer["image"] != str(question.image):
        answer |= {"image": str(question.image)}
        _write_text(text, answer)
    return answer


def there(output: Path, question: Question) -> list[Path]:
    """The files there that have the names of an answer's."""
    return [file for file in _files(output, question) if os.path.lexists(file)]


def other(output: Path, question: Question, asked: str) -> str | None:
    """In words, which file of `question`'s answers another question than the one with the
    fingerprint `asked`; None if none does."""
    mask, overlay, text = _files(output, question)
    known = {question_of(file) for file in (mask, overlay)} - {None}
    answer = _read(text)
    if asked in known or not (known or answer):
        return None
    if answer is None:
        return f"{mask if mask.is_file() else overlay} belongs to the answer to another question"
    if answer["prompt"] != question.prompt:
        return f"{text} answers {answer['prompt']!r}, not {question.prompt!r}"
    if answer.get("image") not in (None, str(question.image)):
        return f"{text} answers {question.prompt!r} about {answer['image']}, not {question.image}"
    return f"{text} answers {question.prompt!r} of another checkpoint, picture or other flags"


def shortcoming(answer: Mapping[str, Any], limit: int) -> str | None:
    """Says what an answer (a STEM.json) lacks; None if it lacks nothing.

    Args:
        limit: the checkpoint's max_new_tokens.
    """
    if not answer["ended"]:
        return f"cut off at {limit} {'token' if limit == 1 else 'tokens'}"
    if answer["box"] is None:
        return "without a box"
    if not answer["mask_area"]:
        return "with an empty mask"
    if not answer["well_formed"]:
        return "not in the form of the training"
    if not _echoes(answer["completion"], answer["prompt"]):
        return "naming something else"
    x0, y0 = (math.floor(v) for v in answer["box"][:2])
    x1, y1 = (math.ceil(v) for v in answer["box"][2:])
    if not coco_mask.decode(answer["rle"])[y0:y1, x0:x1].any():
        return "with a mask outside of its box"
    return None


def _echoes(completion: str, prompt: str) -> bool:
    """Whether an answer begins with the expression, as training teaches; reasoning need not."""
    said, asked = (" ".join(text.split()).casefold() for text in (completion, prompt))
    return "<think>" in said or said.startswith(asked.rstrip("."))


def check_room(output: Path, question: Question) -> None:
    """Raises TakenError where the answer's names are too long, or files of others have them."""
    longest = os.fsencode(f"{question.stem}{OVERLAY}")
    limit = os.pathconf(output, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(longest) > limit:
        raise TakenError(
            f"{question.image}: STEM{OVERLAY} takes {len(longest)} bytes for a name, more than the "
            f"{limit} that {output} allows: give the picture a shorter name"
        )
    mask, _, text = _files(output, question)
    taken = there(output, question)
    if taken and question_of(mask) is None and _read(text) is None:
        raise TakenError(
            f"{question.image}: {taken[0]} is there and no answer of predict.py: move it, or give "
            "another --output"
        )


def write(
    output: Path,
    question: Question,
    pixels: UInt8[np.ndarray, "H W 3"],
    result: Result,
    asked: str = "",
) -> dict[str, Any]:
    """Writes the three files of an answer; the JSON, written last, says that all are there, and is
    returned. Ctrl-C waits until they are.

    Args:
        asked: the question's fingerprint, by which `done` knows the answer.
    """
    box = result.box
    rle = coco_mask.encode(np.asfortranarray(result.mask.astype(np.uint8)))
    answer = {
        "image": str(question.image),
        "prompt": question.prompt,
        "completion": result.completion,
        "ended": result.ended,
        "well_formed": result.well_formed,
        "box": None if box is None else [float(v) for v in box],
        "mask_area": int(result.mask.sum()),
        "rle": {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")},
    }
    picture = Image.fromarray(result.mask.astype(np.uint8) * 255)
    info = PngInfo()
    info.add_text(KEY, asked)
    mask, overlay, text = _files(output, question)
    drawn = drawing.overlay(pixels, box, result.mask, side=max(drawing.PANEL, *picture.size))
    with interrupts.held():
        text.unlink(missing_ok=True)
        for image, file in ((picture, mask), (drawn, overlay)):
            with files.whole(file) as unfinished:
                image.save(unfinished, format="PNG", pnginfo=info)
        _write_text(text, answer)
    return answer


def _files(output: Path, question: Question) -> tuple[Path, Path, Path]:
    mask, overlay, text = (output / f"{question.stem}{end}" for end in (MASK, OVERLAY, TEXT))
    return mask, overlay, text


def _read(text: Path) -> dict[str, Any] | None:
    """An answer's JSON; None for anything else."""
    try:
        answer = json.loads(text.read_bytes()) if text.is_file() else None
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) and answer.keys() >= OURS else None


def _write_text(text: Path, answer: dict[str, Any]) -> None:
    files.write_text(text, json.dumps(answer, ensure_ascii=False, indent=1) + "\n")
