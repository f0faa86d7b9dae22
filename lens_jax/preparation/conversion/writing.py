"""Writes objects as a manifest's rows, on the upright image, as the check will accept them."""

import collections
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from lens_jax.data.masks import decode_runs, draw_polygons, encode_runs
from lens_jax.data.percent import DOUBT, Coordinates, Reach
from lens_jax.data.sample import orientation, to_rgb, turn, turn_box
from lens_jax.data.sources.folder import FILE, RowError, parse, read_target
from lens_jax.data.sources.folder import coordinates as corners_of
from lens_jax.preparation.conversion.objects import Found, LeftOut, Picture, Unfit
from lens_jax.preparation.tally import Tally

ALL = ""  # the name of the group of all objects
PICTURES = "pictures"  # where the output's images lie
Size = tuple[int, int]  # (height, width)

# What the check calls a row that cannot be used -> the sentence of its table.
REASONS = {
    "wrong type": "a value of it has the wrong type",
    "no sentence": "one of its sentences is empty, or no text",
    "empty box": "its box has no area",
    "no mask, no box": "it has neither mask nor box",
    "outside": "it lies outside the picture",
    "empty mask": "its mask holds no pixel",
    "broken mask": "its mask is broken",
    "mask size": "its mask has another size than the picture",
    "box off mask": "its box does not touch its mask",
    "fractions": "its coordinates are fractions of the picture's size, not pixels",
    "percent": "its coordinates are percent of the picture's sides, not pixels",
    "picture too long": "its picture is more than 200 times as long as wide",
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """`rows` were written, by split; `left_out` and `remarks` have (what, how many, the first
    one), and remarks are of rows that were written."""

    rows: dict[str, int]
    pictures: int
    left_out: list[tuple[str, int, str]]
    remarks: list[tuple[str, int, str]]


@dataclasses.dataclass(frozen=True)
class _Known:
    """An image that can be decoded: its size as stored, and how it is turned."""

    stored: Size
    orientation: int

    @property
    def upright(self) -> Size:
        return self.stored if self.orientation < 5 else self.stored[::-1]


def write(
    found: Iterable[Found | LeftOut],
    folder: Path,
    data_dir: Path,
    *,
    scale: bool,
    coordinates: Coordinates,
    progress: Callable[[Iterable], Iterable],
) -> Summary:
    """Writes `folder`/manifest.jsonl and the images of its rows.

    Args:
        coordinates: auto leaves out what is told to be percent by all of its group.
        scale: annotations for an image of another size and the same proportions are scaled to
            it; left out without it.
    """
    pictures = _Pictures(folder, data_dir)
    rows: list[_Row] = []
    left_out = Tally()
    reaches: dict[str, Reach] = collections.defaultdict(Reach)
    with open(folder / FILE, "w", encoding="utf-8") as manifest:
        for item in progress(found):
            if isinstance(item, LeftOut):
                left_out.add(item.reason, item.text)
                continue
            try:
                known = pictures.known(item.picture)
                content, done = _fit(item, known, scale)
                name = pictures.name(item.picture)
                line = json.dumps({"image": name} | content, ensure_ascii=True)
                row = parse(line.encode(), len(rows) + 1)
                if row.error is not None:
                    raise row.error
                read_target(folder, row, known.upright)
                pictures.place(item.picture, name)
            except Unfit as error:
                item = error.at(item.where)
            except RowError as error:
                text = str(error).removeprefix(f"{FILE}, line {len(rows) + 1}: ")
                item = Unfit(REASONS.get(error.kind, error.kind), text).at(item.where)
            except (ValueError, TypeError, OverflowError) as error:
                item = Unfit("its annotation is broken", str(error)).at(item.where)
            if isinstance(item, LeftOut):
                left_out.add(item.reason, item.text)
                continue
            manifest.write(f"{line}\n")
            rows.append(_Row(row.split, name, item.group, item.where, (*item.remarks, *done)))
            if done:  # as it was
                row = parse(json.dumps({"image": name} | item.row).encode(), len(rows))
            corners = corners_of(row) if item.corners is None else item.corners
            for group in (item.group, ALL):
                reaches[group].add(name, item.picture.size or known.upright, corners)
    if coordinates == "auto":
        rows = _without_percent(rows, reaches, folder, pictures, left_out)
    remarks = Tally()
    for row in rows:
        for remark in row.remarks:
            remarks.add(remark, row.where)
        own = reaches[row.group]
        doubted = own.may_be_percent and (own.chance < DOUBT or reaches[ALL].may_be_percent)
        if doubted and coordinates == "auto":
            remarks.add("no coordinate is over 100: they may be percent", row.where)
    splits = collections.Counter(row.split for row in rows)
    return Summary(dict(splits), len(pictures.placed), left_out.rows(), remarks.rows())


@dataclasses.dataclass(frozen=True)
class _Row:
    """The origin of a line of the manifest, and the remarks on it if it stays."""

    split: str
    picture: str
    group: str
    where: str
    remarks: tuple[str, ...]


def _without_percent(
    rows: list[_Row],
    reaches: dict[str, Reach],
    folder: Path,
    pictures: "_Pictures",
    left_out: Tally,
) -> list[_Row]:
    """Removes the lines, and the images, of groups that are in percent."""
    kept = [not reaches[row.group].is_percent for row in rows]
    if all(kept):
        return rows
    for row, keep in zip(rows, kept, strict=True):
        if not keep:
            what = f"{row.where}: {reaches[row.group]} (--coordinates pixels takes them for pixels)"
            left_out.add(REASONS["percent"], what)
    whole, part = folder / FILE, folder / f"{FILE}.part"
    with open(whole, encoding="utf-8") as lines, open(part, "w", encoding="utf-8") as manifest:
        manifest.writelines(line for line, keep in zip(lines, kept, strict=True) if keep)
    part.replace(whole)
    rows = [row for row, keep in zip(rows, kept, strict=True) if keep]
    for name in pictures.placed - {row.picture for row in rows}:
        (folder / name).unlink()
        pictures.placed.remove(name)
    return rows


class _Pictures:
    """Images on their way to the output: each is decoded before anything of it is written."""

    def __init__(self, folder: Path, data_dir: Path):
        self.folder, self.data_dir = folder, data_dir
        self.placed: set[str] = set()
        self._known: dict[Path, _Known | Unfit] = {}

    def known(self, picture: Picture) -> _Known:
        """Raises Unfit where an image cannot be used."""
        if picture.path not in self._known:
            try:
                self._known[picture.path] = self._look(picture)
            except Unfit as error:
                self._known[picture.path] = error
        known = self._known[picture.path]
        if isinstance(known, Unfit):
            raise Unfit(known.reason, str(known))
        return known

    def _look(self, picture: Picture) -> _Known:
        file = io.BytesIO(picture.content) if picture.content is not None else picture.path
        if picture.content is None:
            place = picture.path.resolve()
            if not any(place.is_relative_to(root.resolve()) for root in picture.roots):
                what = f"{picture.path} is a link to {place}: copy the data set with `cp -rL`"
                raise Unfit("its picture is a link that leads out of the data set", what)
        try:
            with Image.open(file) as image:
                stored = to_rgb(image, pixels="stored").shape
                return _Known((stored[0], stored[1]), orientation(image))
        except FileNotFoundError:
            raise Unfit("its picture is missing", f"no {picture.path}") from None
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            what = f"{picture.path}: {error}".replace(" <_io.BytesIO", " <").partition(" <")[0]
            raise Unfit("its picture cannot be read", what) from None

    def name(self, picture: Picture) -> str:
        """Its place in the output: that which it has in data_dir."""
        path, root = (os.path.abspath(p) for p in (picture.path, self.data_dir))
        return str(PurePosixPath(PICTURES, *Path(path).relative_to(root).parts))

    def place(self, picture: Picture, name: str) -> None:
        if name in self.placed:
            return
        target = self.folder / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if picture.content is not None:
                target.write_bytes(picture.content)
            else:
                try:
                    os.link(picture.path.resolve(), target)
                except OSError:
                    shutil.copyfile(picture.path, target)
        except OSError as error:
            raise Unfit("its picture cannot be copied", str(error)) from error
        self.placed.add(name)


def _fit(item: Found, known: _Known, scale: bool) -> tuple[dict[str, Any], list[str]]:
    """An object's row on the upright image, and what was done to it.

    Raises:
        Unfit, ValueError: it is for another image, or its mask is broken.
    """
    size, row = item.picture.size, dict(item.row)
    if isinstance(row.get("rle"), dict) and (own := _size(row["rle"].get("size"))) is not None:
        size = size or own
        if own != size:
            what = f"{own[1]} x {own[0]} pixels, but its annotation says {size[1]} x {size[0]}"
            raise Unfit("its run lengths are for another size", what)
    stored = _speaks_for_stored(size, known, item.picture.pixels)
    target = known.stored if stored else known.upright
    done = []
    if size is not None and size != target:
        what = (
            f"it has {target[1]} x {target[0]} pixels, but its annotation says "
            f"{size[1]} x {size[0]}"
        )
        if not _same_proportions(size, target):
            raise Unfit("its picture has other proportions than its annotation says", what)
        if not scale:
            what += " (--resized scale makes annotations fit)"
            raise Unfit("its picture was resized after it was annotated", what)
        done.append("scaled to the size of its picture")
        row = _scaled(row, size, target)
    if stored and known.orientation != 1:
        done.append("turned upright with its picture")
        row = _turned(row, known.stored, known.orientation)
    return row, done


def _speaks_for_stored(size: Size | None, known: _Known, otherwise: str) -> bool:
    """Whether an annotation lies on the stored pixels: its size tells, or its kind.

    Where the size fits neither way, proportions may.
    """
    if size is not None:
        fits = [size == target for target in (known.stored, known.upright)]
        if not any(fits):
            fits = [_same_proportions(size, target) for target in (known.stored, known.upright)]
        if fits[0] != fits[1]:
            return fits[0]
    return otherwise == "stored"


def _same_proportions(size: Size, other: Size) -> bool:
    """Whether one is the other times a number, but for rounding."""
    lowest = max((b - 1) / a for a, b in zip(size, other, strict=True))
    highest = min((b + 1) / a for a, b in zip(size, other, strict=True))
    return lowest <= highest


def _scaled(row: dict[str, Any], size: Size, target: Size) -> dict[str, Any]:
    (height, width), (new_height, new_width) = size, target
    factors = np.array([new_width / width, new_height / height])
    row = dict(row)
    if row.get("polygons") is not None:
        row["polygons"] = [
            (np.reshape(np.array(part, np.float64), (-1, 2)) * factors).ravel().tolist()
            for part in row["polygons"]
        ]
    if row.get("box") is not None:
        row["box"] = (np.array(row["box"], np.float64) * np.tile(factors, 2)).tolist()
    if row.get("rle") is not None:
        mask = Image.fromarray(decode_runs(row["rle"], size))
        row["rle"] = encode_runs(np.asarray(mask.resize(target[::-1], Image.Resampling.NEAREST)))
    return row


def _turned(row: dict[str, Any], stored: Size, orientation: int) -> dict[str, Any]:
    """Polygons become run lengths: turned, their edges would be rounded to other pixels."""
    row = dict(row)
    mask = None
    if row.get("rle") is not None:
        mask = decode_runs(row.pop("rle"), stored)
    elif row.get("polygons") is not None:
        corners = [np.reshape(np.array(p, np.float64), (-1, 2)) for p in row.pop("polygons")]
        mask = draw_polygons(corners, stored) > 0
    if mask is not None:
        row["rle"] = encode_runs(turn(mask, orientation))
    if row.get("box") is not None:
        row["box"] = turn_box(row["box"], stored, orientation).tolist()
    return row


def _size(value: Any) -> Size | None:
    """(height, width) of run lengths, where they say it."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    if not all(type(side) in (int, float) and 1 <= side < 1e9 for side in value):
        return None
    return (int(value[0]), int(value[1]))
