"""A data set of one's own: images and `manifest.jsonl`, one object a line (docs/own_data.md).

    {"image": "photos/a.jpg", "expressions": ["the left cup"], "mask": "masks/a.png"}

`mask` (an image of it, `data/mask_files.py`), `polygons`, `rle` and `box` say where the object
is, on the upright image; what is missing is derived. A key of these with null, and no other, says
that nothing in the image is meant. `split` is train where it is missing.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lens_jax.data import boxes
from lens_jax.data.mask_files import read_mask
from lens_jax.data.masks import decode_runs, draw_polygons
from lens_jax.data.sample import Sample, SampleError, orientation, read_image
from lens_jax.data.sources import annotations

FILE = "manifest.jsonl"
SHAPES = ("mask", "polygons", "rle")  # of which a row has one at most
KEYS = ("image", "expressions", *SHAPES, "box", "split")


class RowError(SampleError):
    """A row that cannot be used. `kind` is what is wrong in two or three words."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class ManifestRow:
    """A line of the manifest, checked for types, before any file is opened.

    `shape` is the value of the key `form`, one of SHAPES; both are None where there is but a box,
    or where there is no target. `error` says why a line cannot be used; the rest is then empty.
    """

    line: int
    split: str | None  # None: the line is too broken to say
    image: str = ""
    expressions: tuple[str, ...] = ()
    form: str | None = None
    shape: Any = None
    box: tuple[float, ...] | None = None
    unknown: tuple[str, ...] = ()
    error: RowError | None = None


class Folder:
    """One split of the manifest, in its order.

    A line that is broken counts as a sample with one sentence, of every split if its own cannot be
    read, and raises when it is asked for: nothing gets lost unseen.

    Args:
        data_dir: the folder that holds manifest.jsonl.
        split: any name that `split` of some row says.

    Raises:
        FileNotFoundError, ValueError: the file or the split is not there, or it is no text.
    """

    def __init__(self, data_dir: str | Path, split: str = "train"):
        self.data_dir = Path(data_dir)
        rows = read_manifest(self.data_dir)
        splits = sorted({row.split for row in rows if row.split is not None})
        if split not in splits:
            what = f"none of {', '.join(splits)}" if splits else "not there: no row has a split"
            raise ValueError(
                f"split: {split!r} is {what} in {self.data_dir / FILE}: write it on the rows that "
                "are meant, or name another one (data.split is trained on, data.eval_split "
                "evaluated on)"
            )
        self.rows = [row for row in rows if row.split in (split, None)]
        self._numbers = {name: i for i, name in enumerate(dict.fromkeys(r.image for r in rows))}
        self.num_expressions = [max(1, len(row.expressions)) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        sample = read_row(self.data_dir, row)
        return dataclasses.replace(sample, image_id=self._numbers[row.image])


def read_manifest(data_dir: Path) -> list[ManifestRow]:
    """All lines that are not empty. Raises FileNotFoundError or ValueError if there is none."""
    file = data_dir / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: data_dir must hold it, one object a line")
    content = file.read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise ValueError(f"{file} is a JSON list: write one object a line")
    lines = content.split(b"\n")
    rows = [parse(line, number, file) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"{file} is empty: give one JSON object a line")
    return rows


def parse(line: bytes, number: int, file: Path = Path(FILE)) -> ManifestRow:
    """A line of the manifest; what is wrong with it is in `error`, which names `file`."""
    split, image = None, ""
    try:
        content = _content(line, "utf-8-sig" if number == 1 else "utf-8")
        name = content.get("split", "train")
        if not _is_text(name):
            raise RowError("wrong type", f"split must be a name, not {_short(name)}")
        split = name
        if _is_text(content.get("image")):
            image = content["image"]
        return _typed(content, number, split)
    except RowError as error:
        located = RowError(error.kind, f"{file}, line {number}: {error}")
        return ManifestRow(number, split, image, error=located)


def _content(line: bytes, encoding: str) -> dict[str, Any]:
    try:
        content = json.loads(line.decode(encoding))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RowError("not JSON", f"not JSON ({reason})") from None
    if not isinstance(content, dict):
        raise RowError("not JSON", "not a JSON object")
    return content


def read_row(data_dir: Path, row: ManifestRow) -> Sample:
    """Opens the files of a row and derives what it does not say.

    Raises:
        RowError: the row cannot be used.
    """
    if row.error is not None:
        raise row.error
    where = f"{data_dir / FILE}, line {row.line}"
    path = file_of(data_dir, row.image)
    try:
        image = read_image(path)
    except SampleError as error:
        raise RowError("unreadable picture", f"{where}: {error}") from error
    size = (image.shape[0], image.shape[1])
    try:
        mask, box = read_target(data_dir, row, size)
    except RowError as error:
        hint = ""
        if error.kind == "mask size" and (turned := orientation(path)) != 1:
            hint = f", upright as EXIF orientation {turned} turns it"
        raise RowError(error.kind, f"{where}: {error}{hint}") from error
    return Sample(
        image=image,
        expressions=row.expressions,
        mask=mask,
        box=box,
        ref_id=row.line,
        image_id=row.line,
        image_path=str(path),
    )


def read_target(
    data_dir: Path, row: ManifestRow, size: tuple[int, int]
) -> tuple[Bool[np.ndarray, "H W"], Float[np.ndarray, "4"] | None]:
    """A row's mask and box xyxy, for an image of `size` (height, width).

    Raises:
        RowError: the row cannot be used with such an image.
    """
    if max(size) > 200 * min(size):
        message = f"{row.image}: {size[1]} x {size[0]} pixels, more than 200 times as long as wide"
        raise RowError("picture too long", message)
    for what, corners in _coordinates(row).items():
        if max(size) > 2 and corners.min() > -0.01 and corners.max() < 1.01:
            here = f"give pixels, here of {size[1]} x {size[0]}"
            verb = "lies" if what == "box" else "lie"
            raise RowError("fractions", f"{what} {verb} in 0..1; {here}")
    mask = _mask(data_dir, row, size)
    return mask, _box(row, mask)


def file_of(data_dir: Path, name: str) -> Path:
    """Where a file of the manifest lies, its name with any system's separators."""
    path = data_dir / name
    return data_dir / name.replace("\\", "/") if "\\" in name and not _exists(path) else path


def coordinates(row: ManifestRow) -> Float[np.ndarray, "N 2"]:
    """All corners (x, y) of a row's polygons and box. Raises RowError for what are no polygons."""
    return np.concatenate([np.empty((0, 2)), *_coordinates(row).values()])


def _coordinates(row: ManifestRow) -> dict[str, Float[np.ndarray, "N 2"]]:
    """The corners of each of its keys that has some."""
    found = {} if row.box is None else {"box": np.reshape(row.box, (2, 2))}
    if row.form == "polygons":
        found["polygons"] = np.concatenate(_polygons(row.shape))
    return found


def _typed(content: dict[str, Any], number: int, split: str) -> ManifestRow:
    image, expressions = content.get("image"), content.get("expressions")
    if not _is_text(image):
        raise RowError("wrong type", "image must be the path of a picture, in Unicode")
    _check_name(image, "image")
    if not isinstance(expressions, list) or not expressions:
        raise RowError("wrong type", "expressions must be a list of one or more sentences")
    for expression in expressions:
        try:
            annotations.sentence(expression, "one of the expressions")
        except ValueError as error:
            raise RowError("no sentence", str(error)) from None
    given = [key for key in SHAPES if content.get(key) is not None]
    if len(given) > 1:
        raise RowError("two masks", f"give one of {' and '.join(given)}")
    box = content.get("box")
    if box is not None:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise RowError("wrong type", f"box must be [x0, y0, x1, y1], not {_short(box)}")
        if box[0] >= box[2] or box[1] >= box[3]:
            message = f"box: {box} has no area as [x0, y0, x1, y1]"
            raise RowError("empty box", message)
        box = tuple(map(float, box))
    if not any(key in content for key in (*SHAPES, "box")):
        message = 'give mask, polygons, rle or box, or "box": null if nothing is meant'
        raise RowError("no mask, no box", message)
    form = given[0] if given else None
    shape = content[form] if form else None
    if form == "mask":
        if not _is_text(shape):
            message = f"mask must be the relative path of a PNG, not {_short(shape)}"
            raise RowError("wrong type", message)
        _check_name(shape, "mask")
    unknown = tuple(key for key in content if key not in KEYS)
    return ManifestRow(number, split, image, tuple(expressions), form, shape, box, unknown)


def _mask(data_dir: Path, row: ManifestRow, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    height, width = size
    if row.form is None:
        mask = np.zeros(size, bool)
        if row.box is None:
            return mask
        # Pixels whose centre is inside.
        x0, y0, x1, y1 = (max(0, math.ceil(v - 0.5)) for v in row.box)
        mask[y0:y1, x0:x1] = True
        if not mask.any():
            raise RowError("outside", f"box: {list(row.box)} holds no pixel of {width} x {height}")
        return mask
    if row.form == "mask":
        mask = _read_mask(file_of(data_dir, row.shape), size)
    elif row.form == "polygons":
        try:
            mask = draw_polygons(_polygons(row.shape), size) > 0
        except ValueError as error:
            raise RowError("outside", f"polygons: {error}") from error
    else:
        if isinstance(row.shape, dict) and row.shape.get("size") != list(size):
            said = _short(row.shape.get("size"))
            raise _wrong_size(f"rle says {said} for [height, width], and", size)
        try:
            mask = decode_runs(row.shape, size)
        except ValueError as error:
            raise RowError("broken mask", f"rle: {error}") from error
    if not mask.any():
        raise RowError("empty mask", f'{row.form} is empty; "mask": null says nothing is meant')
    return mask


def _box(row: ManifestRow, mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "4"] | None:
    if row.box is None:
        return boxes.mask_box(mask) if mask.any() else None
    height, width = mask.shape
    box = np.clip(row.box, 0, [width, height, width, height])
    if not boxes.touch(box, boxes.mask_box(mask)):
        raise RowError("box off mask", f"box: {list(row.box)} does not touch the {row.form}")
    return box


def _wrong_size(what: str, size: tuple[int, int]) -> RowError:
    return RowError("mask size", f"{what} its picture has {size[1]} x {size[0]} pixels")


def _read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    try:
        mask = read_mask(path).mask
    except FileNotFoundError:
        raise RowError("no mask file", f"{path}: no such mask") from None
    except ValueError as error:
        raise RowError("broken mask", f"{path}: not a readable mask ({error})") from error
    if mask.shape != size:
        height, width = mask.shape
        raise _wrong_size(f"{path} has {width} x {height} pixels,", size)
    return mask


def _check_name(name: str, key: str) -> None:
    """Raises RowError for the name of a file outside data_dir."""
    try:
        annotations.inside(Path(), name, key)
    except ValueError as error:
        raise RowError("bad name", str(error)) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _polygons(polygons: Any) -> list[Float[np.ndarray, "N 2"]]:
    """The corners (x, y) of each polygon."""
    if not isinstance(polygons, list) or not polygons:
        raise RowError("wrong type", "polygons must be a list of lists [x, y, x, y, ...]")
    return [_corners(polygon) for polygon in polygons]


def _corners(polygon: Any) -> Float[np.ndarray, "N 2"]:
    flat = polygon
    if isinstance(polygon, list) and polygon and isinstance(polygon[0], list):
        if not all(isinstance(point, list) and len(point) == 2 for point in polygon):
            raise RowError("wrong type", "polygons: a corner must be [x, y]")
        flat = [value for point in polygon for value in point]
    if not isinstance(flat, list) or not all(map(_is_number, flat)):
        raise RowError("wrong type", f"polygons: expected [x, y, x, y, ...], not {_short(polygon)}")
    if len(flat) < 6 or len(flat) % 2:
        raise RowError("wrong type", f"polygons: {len(flat)} numbers are not 3 or more corners")
    return np.array(flat, np.float64).reshape(-1, 2)


def _is_text(value: Any) -> bool:
    """Whether a value is a string that is not blank and that can be written as UTF-8."""
    try:
        annotations.sentence(value)
    except ValueError:
        return False
    return True


def _is_number(value: Any) -> bool:
    # Larger ones have no place in an image, and integers may have thousands of digits.
    return type(value) in (int, float) and -1e9 < value < 1e9


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
