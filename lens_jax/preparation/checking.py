"""Checks a data set of one's own: reads every row as training does, and counts what is wrong."""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lens_jax.data import images
from lens_jax.data.boxes import box_iou, mask_box
from lens_jax.data.mask_files import read_mask
from lens_jax.data.percent import DOUBT, LARGE, Coordinates, Reach
from lens_jax.data.sample import Sample
from lens_jax.data.sources.folder import (
    FILE,
    ManifestRow,
    RowError,
    coordinates,
    file_of,
    read_manifest,
    read_row,
)
from lens_jax.files import printable
from lens_jax.preparation.tally import Tally
from lens_jax.reports import drawing, pages

if TYPE_CHECKING:
    from lens_jax.data.processor import Processor

FIT = 0.7  # IoU that a given box has at least with its mask's own
SLACK = 1.0  # pixels by which coordinates may leave the image unremarked
SIDE = 260  # pixels of a thumbnail's longer side
LISTED = 500  # rows listed on the page for each kind of problem


@dataclasses.dataclass(frozen=True)
class Note:
    """One remark on one row: what it is in two or three words, and the whole of it."""

    kind: str
    text: str


@dataclasses.dataclass
class Verdict:
    """Findings about a row: `error` if it cannot be used, else `notes` on what to look at.

    `picture` and `target` are digests of the image's file and of the mask; `size` is (height,
    width); `box` is the sample's.
    """

    row: ManifestRow
    error: Note | None = None
    notes: list[Note] = dataclasses.field(default_factory=list)
    no_target: bool = False
    picture: bytes = b""
    target: bytes = b""
    size: tuple[int, int] = (0, 0)
    box: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows of a manifest, in its order."""

    data_dir: Path
    verdicts: list[Verdict]

    @property
    def unusable(self) -> int:
        return sum(verdict.error is not None for verdict in self.verdicts)

    @property
    def splits(self) -> list[str]:
        """The names of all splits."""
        return sorted({v.row.split for v in self.verdicts if v.row.split is not None})

    def counts(self) -> list[dict[str, Any]]:
        """A row for each split and one for all: rows = usable + unusable; `no target`, `samples`
        and `pictures` are of the usable ones. A line too broken to name its split is under `?`."""
        by_split = collections.defaultdict(list)
        for verdict in self.verdicts:
            by_split["?" if verdict.row.split is None else verdict.row.split].append(verdict)
        table = [_count(split, by_split[split]) for split in sorted(by_split)]
        return [*table, _count("all", self.verdicts)]

    def errors(self) -> list[tuple[str, int, str]]:
        """(kind, rows, the first one's text), the most frequent first; the rows add up to
        `unusable`."""
        return _tallied([v.error] for v in self.verdicts if v.error is not None)

    def notes(self) -> list[tuple[str, int, str]]:
        """The same for what usable rows should be looked at for; a row may come under several."""
        return _tallied(v.notes for v in self.verdicts)


def check(
    data_dir: Path,
    progress: Callable[..., Iterable] = lambda rows, **_: rows,
    *,
    coordinates: Coordinates = "auto",
) -> Report:
    """Reads every row of `data_dir`/manifest.jsonl, with as many threads as there are cores.

    Args:
        coordinates: "pixels" takes them for such even if they look like percent.

    Raises:
        FileNotFoundError, ValueError: there is no manifest, or no row in it.
    """
    rows = read_manifest(data_dir)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = pool.map(lambda row: _judge(data_dir, row), rows)
        verdicts = list(progress(judged, total=len(rows)))
    if coordinates == "auto":
        _find_percent([verdict for verdict in verdicts if verdict.error is None])
    usable = [verdict for verdict in verdicts if verdict.error is None]
    _compare_splits(usable)
    _compare_sentences(usable)
    return Report(data_dir, verdicts)


def buckets(report: Report, processor: "Processor", *, reasoning: bool = False) -> dict[str, Any]:
    """data.windows, data.prompt_tokens, data.answer_tokens and data.canvas with which every
    usable row fits. Larger masks than SAM's image need no canvas of their own: `shrunken`."""
    usable = [verdict for verdict in report.verdicts if verdict.error is None]
    needs = [
        dataclasses.astuple(processor.needs(v.size, text, v.box, reasoning=reasoning))
        for v in usable
        for text in v.row.expressions
    ]
    windows, prompt, answer = map(max, zip(*needs, strict=True))
    canvas = [
        min(max(sides), processor.sam_size) for sides in zip(*(v.size for v in usable), strict=True)
    ]
    return {
        "windows": [windows],
        "prompt_tokens": [-(-prompt // 64) * 64],
        "answer_tokens": [-(-answer // 32) * 32],
        "canvas": [canvas],
    }


def shrunken(report: Report, canvas: tuple[int, int]) -> int:
    """Usable rows whose mask is larger than a canvas (height, width), as training counts them."""
    return sum(v.error is None and images.is_shrunken(v.size, canvas) for v in report.verdicts)


def page(report: Report, thumbnails: int) -> str:
    """A self-contained HTML page: the counts, the problems, and images with their masks.

    Args:
        thumbnails: how many at most; rows to look at come first, the rest is spread evenly.
    """
    usable = [verdict for verdict in report.verdicts if verdict.error is None]
    noted = [verdict for verdict in usable if verdict.notes][: (thumbnails + 1) // 2]
    others = [verdict for verdict in usable if not verdict.notes]
    room = min(thumbnails - len(noted), len(others))
    spread = [others[i * len(others) // room] for i in range(room)]
    return pages.render(
        "preparation/checking.html",
        data_dir=printable(report.data_dir),
        counts=report.counts(),
        errors=report.errors(),
        notes=report.notes(),
        broken=[v for v in report.verdicts if v.error is not None][:LISTED],
        more=max(0, report.unusable - LISTED),
        noted=[(v, _thumbnail(report.data_dir, v.row)) for v in noted],
        spread=[(v, _thumbnail(report.data_dir, v.row)) for v in spread],
    )


def _judge(data_dir: Path, row: ManifestRow) -> Verdict:
    try:
        sample = read_row(data_dir, row)
        content = file_of(data_dir, row.image).read_bytes()
        picture = hashlib.blake2b(content, digest_size=16).digest()
    except RowError as error:
        text = str(error).replace(str(data_dir / FILE), FILE, 1)
        return Verdict(row, Note(error.kind, printable(text)))
    except OSError as error:
        return Verdict(row, Note("unreadable picture", printable(f"{_where(row)}: {error}")))
    target = hashlib.blake2b(np.packbits(sample.mask).tobytes(), digest_size=16).digest()
    notes = [
        Note(kind, printable(f"{_where(row)}: {text}"))
        for kind, text in _remarks(data_dir, row, sample)
    ]
    size = (sample.mask.shape[0], sample.mask.shape[1])
    return Verdict(row, None, notes, not sample.mask.any(), picture, target, size, sample.box)


def _remarks(data_dir: Path, row: ManifestRow, sample: Sample) -> Iterable[tuple[str, str]]:
    """Remarks on what may be a mistake in a row."""
    height, width = sample.mask.shape
    if row.form == "mask":
        for kind, text in read_mask(file_of(data_dir, row.shape)).doubts:
            yield kind, f"{row.shape}: {text}"
    if sample.mask.all():
        yield "whole picture", f"{row.form or 'box'} covers the whole picture"
    elif sample.mask[:: height - 1 or 1, :: width - 1 or 1].all():
        what = f"{row.form} covers all four corners: is it the background that is marked?"
        yield "all corners", what
    corners = coordinates(row)
    over = np.maximum(corners - [width, height], -corners)
    if over.size and over.max() > SLACK:
        what = f"{row.form or 'box'} leaves the picture by {over.max():.1f} pixels and is cut off"
        yield "outside the picture", what
    if row.box is not None and row.form is not None:
        fit = box_iou(row.box, mask_box(sample.mask))
        if fit < FIT:
            yield "box against mask", f"box and {row.form} have an IoU of {fit:.2f}"
    if row.unknown:
        yield "keys not read", ", ".join(row.unknown)


def _compare_splits(verdicts: Sequence[Verdict]) -> None:
    """Notes images, told by their files' content, that several splits hold."""
    splits = collections.defaultdict(dict)
    for verdict in verdicts:
        splits[verdict.picture].setdefault(verdict.row.split, verdict.row)
    for verdict in verdicts:
        for split, row in splits[verdict.picture].items():
            if split != verdict.row.split:
                text = f"{verdict.row.image} is in {verdict.row.split}, and in {split} (line "
                note = Note("split leakage", f"{_where(verdict.row)}: {text}{row.line})")
                verdict.notes.append(note)


def _compare_sentences(verdicts: Sequence[Verdict]) -> None:
    """Notes sentences that a split says twice about one image, for one object or for two."""
    said: dict[tuple, Verdict] = {}
    for verdict in verdicts:
        row, own = verdict.row, set()
        for sentence in row.expressions:
            words = " ".join(sentence.casefold().split())
            key = (row.split, verdict.picture, words)
            first = said.setdefault(key, verdict)
            if first is verdict and key not in own:
                own.add(key)
                continue
            same = first.target == verdict.target
            kind = "duplicated" if same else "one sentence, two objects"
            text = f"“{sentence}” stands in line {first.row.line} already"
            note = Note(kind, f"{_where(row)}: {text}{'' if same else ', for another mask'}")
            verdict.notes.append(note)


def _find_percent(verdicts: Sequence[Verdict]) -> None:
    """Refuses rows in percent, told by all of their split or of their images' folder; notes what
    may be such."""
    groups: dict[Any, list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        groups["split", verdict.row.split].append(verdict)
        groups["folder", os.path.dirname(verdict.row.image)].append(verdict)
    doubted: dict[int, str] = {}
    for (kind, name), members in groups.items():
        reach = Reach()
        for verdict in members:
            reach.add(verdict.row.image, verdict.size, coordinates(verdict.row))
        where = f"{kind} {name!r}"
        if reach.is_percent:
            for verdict in members:
                verdict.error = Note(
                    "percent",
                    printable(
                        f"{_where(verdict.row)}: {reach} in {where}: they are percent; give "
                        "pixels, or say --coordinates pixels if they are"
                    ),
                )
        elif reach.may_be_percent and (kind == "split" or reach.chance < DOUBT):
            doubted |= {id(verdict): where for verdict in members}
    for verdict in verdicts:
        large = min(verdict.size) >= LARGE and coordinates(verdict.row).size
        if id(verdict) in doubted and verdict.error is None and large:
            height, width = verdict.size
            text = (
                f"no coordinate in {doubted[id(verdict)]} is over 100, but the picture has "
                f"{width} x {height} pixels"
            )
            verdict.notes.append(
                Note("perhaps percent", printable(f"{_where(verdict.row)}: {text}"))
            )


def _count(split: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    usable = [verdict for verdict in verdicts if verdict.error is None]
    return {
        "split": split,
        "rows": len(verdicts),
        "usable": len(usable),
        "unusable": len(verdicts) - len(usable),
        "no target": sum(verdict.no_target for verdict in usable),
        "samples": sum(len(verdict.row.expressions) for verdict in usable),
        "pictures": len({verdict.picture for verdict in usable}),
    }


def _tallied(rows: Iterable[Sequence[Note]]) -> list[tuple[str, int, str]]:
    """A row counts once for each kind of its notes."""
    tally = Tally()
    for notes in rows:
        for kind, text in {note.kind: note.text for note in reversed(notes)}.items():
            tally.add(kind, text)
    return tally.rows()


def _thumbnail(data_dir: Path, row: ManifestRow) -> str:
    """The image with mask and box as a data URI."""
    sample = read_row(data_dir, row)
    return pages.data_uri(drawing.overlay(sample.image, sample.box, sample.mask, side=SIDE))


def _where(row: ManifestRow) -> str:
    return f"{FILE}, line {row.line}"
