"""Questions to a model, an image and a sentence each: from a folder, or from a list."""

import dataclasses
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lens_jax.data.sources.annotations import sentence

# Endings that Pillow knows and does not decode.
NO_PICTURES = {".pdf", ".palm", ".bufr", ".grib", ".h5", ".hdf", ".mpg", ".mpeg"}
MASK, OVERLAY, TEXT = ".mask.png", ".overlay.png", ".json"  # endings of an answer's files
KEY = "lens"  # the text of an answer's PNG files that says what was asked of which checkpoint


class ListError(Exception):
    """A list of questions that cannot be read; the text names file and line."""


@dataclasses.dataclass(frozen=True)
class Question:
    """An expression to look for in an image, and the stem of the names of the answer's files."""

    image: Path
    prompt: str
    stem: str


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images of a folder by name, and what else lies there, counted by ending."""

    pictures: list[Path]
    others: Counter[str]
    folders: int

    @classmethod
    def of(cls, folder: Path) -> "ImageFolder":
        """Hidden files and the files of answers are neither; folders in it are not entered."""
        endings = Image.registered_extensions().keys() - NO_PICTURES
        pictures, others, folders = [], Counter(), 0
        for file in sorted(folder.iterdir()):
            ending = file.suffix.lower()
            if file.name.startswith(".") or _is_answer(file):
                continue
            if ending in endings:
                pictures.append(file)
            elif file.is_dir():
                folders += 1
            else:
                others[ending or "no ending"] += 1
        return cls(pictures, others, folders)

    @property
    def passed_over(self) -> list[str]:
        """The files and folders that are not asked about, in words."""
        said = []
        if count := self.others.total():
            kinds = ", ".join(f"{ending} {n}" for ending, n in self.others.most_common())
            files = "file of another kind" if count == 1 else "files of other kinds"
            said.append(f"{count} {files} passed over ({kinds})")
        if self.folders:
            said.append(f"{self.folders} folder{'s' * (self.folders > 1)} not entered")
        return said


def question_of(file: Path) -> str | None:
    """The question that a mask or overlay of ours was the answer to; None for any other file."""
    if not file.is_file():
        return None
    try:
        with Image.open(file) as picture:
            return picture.info.get(KEY) if picture.format == "PNG" else None
    except Exception:  # no image, or none of ours
        return None


def _is_answer(file: Path) -> bool:
    """Names alone say nothing: people call their own masks so, too."""
    if file.suffix == TEXT:
        file = file.with_name(f"{file.stem}{MASK}")
    return file.name.endswith((MASK, OVERLAY)) and question_of(file) is not None


def read_list(file: Path) -> list[tuple[Path, str]]:
    """Images and sentences of a JSONL file; empty lines are passed over.

    Raises:
        ListError: a line is no such pair, or there is none.
    """
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ListError(f"{file} is UTF-16 text: save it as UTF-8")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ListError(f"{file} is not UTF-8 text: save it as UTF-8") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        if line.lstrip().startswith("["):
            raise ListError(f"{where}: a JSON list; write one object a line")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ListError(f"{where}: not JSON ({error})") from None
        for key in ("image", "prompt"):
            value = row.get(key) if isinstance(row, dict) else None
            if value is not None and not isinstance(value, str):
                raise ListError(f"{where}: {key!r} is text, not {json.dumps(value)[:60]}")
            if not (value or "").strip():
                raise ListError(f"{where}: {key!r} is missing or empty")
        try:
            sentence(row["prompt"], "'prompt'")
        except ValueError as error:
            raise ListError(f"{where}: {error}") from None
        pairs.append((_locate(file.parent, row["image"]), row["prompt"].strip()))
    if not pairs:
        raise ListError(f"{file} holds no questions")
    return pairs


def _locate(folder: Path, text: str) -> Path:
    """An image relative to the list's folder: by this name, or as Windows and shells mean it."""
    meant = (text, text.replace("\\", "/"), os.path.expanduser(text))
    found = (folder / name for name in meant if os.path.exists(folder / name))
    return next(found, folder / text)


def name(pairs: Sequence[tuple[Path, str]]) -> list[Question]:
    """Questions with stems of their own; an image's first one is called like the image.

    Stems that differ only in case, or in how accents are encoded, are one: on some file systems
    their files would be.
    """

    def alike(stem: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", stem).casefold())

    taken = {alike(image.stem) for image, _ in pairs}
    given: set[str] = set()
    questions = []
    for image, prompt in pairs:
        stem, number = image.stem, 1
        while alike(stem) in given or (number > 1 and alike(stem) in taken):
            number += 1
            stem = f"{image.stem}-{number}"
        given.add(alike(stem))
        questions.append(Question(image, prompt, stem))
    return questions
