"""Objects of a data set as the layouts' readers give them, and where their images lie."""

import dataclasses
import functools
import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lens_jax.data.sources.annotations import short
from lens_jax.data.sources.refcoco import is_sliver

# Words of a file's or folder's name -> the split it holds.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLITS |= {"validation": "val", "test": "test", "testa": "testA", "testb": "testB"}
# What reading an annotation of any form raises.
BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that an annotation names.

    Attributes:
        path: where it lies, or would lie if `content` were a file.
        roots: folders of which one must hold the file, links followed.
        content: its bytes, where the annotation brings them along.
        size: (height, width) as the annotation says.
        pixels: which ones the annotation speaks for where its size fits both.
    """

    path: Path
    roots: tuple[Path, ...] = ()
    content: bytes | None = None
    size: tuple[int, int] | None = None
    pixels: Literal["upright", "stored"] = "upright"


@dataclasses.dataclass(frozen=True)
class Found:
    """An object of the old layout: a manifest's row without its image, on the annotation's
    pixels. `where` is its place in the old layout, `group` what was annotated together with it (a
    file, or a folder of files of an image each), and `remarks` what was done with it. `corners`
    (x, y) are those of what `row` holds as drawn mask."""

    picture: Picture
    row: dict[str, Any]
    where: str
    group: str = ""
    remarks: tuple[str, ...] = ()
    corners: Float[np.ndarray, "N 2"] | None = None


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An object, or a file of them, that a manifest cannot say: why, in a sentence, and where."""

    reason: str
    text: str


class Unfit(Exception):
    """Raised where an object turns out to be one that is left out."""

    def __init__(self, reason: str, text: str = ""):
        super().__init__(text)
        self.reason = reason

    def at(self, where: str) -> LeftOut:
        return LeftOut(self.reason, f"{where}: {self}" if str(self) else where)


def split_of(*names: str) -> str:
    """The split that names tell; train if none does."""
    return told_split(*names) or "train"


def told_split(*names: str) -> str | None:
    """The split that the words of names tell, the last one of several."""
    words = "_".join(names).replace("-", "_").replace(".", "_").lower().split("_")
    found = [SPLITS[w] for word in words if (w := word.rstrip("0123456789")) in SPLITS]
    return found[-1] if found else None


def read_json(file: Path) -> Any:
    """The content of a JSON file: UTF-8, or UTF-16 or 32, which it tells by itself.

    Raises:
        ValueError, OSError, RecursionError: it cannot be read.
    """
    try:
        return json.loads(file.read_bytes())
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8; save it so") from None


def json_files(data_dir: Path, *patterns: str) -> list[Path]:
    """Files in order, without those that macOS leaves beside them on foreign disks."""
    files = {file for pattern in patterns for file in data_dir.glob(pattern)}
    return sorted(file for file in files if not file.name.startswith("._"))


def find(data_dir: Path, places: Sequence[Path], name: Any) -> Picture:
    """The image of a name in the first of some folders that holds it.

    Separators may be those of Windows, and letters be large or small; no name leads out of
    data_dir.

    Raises:
        Unfit: none of them does.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise Unfit("its picture has no name")
    reachable, root = False, Path(os.path.abspath(data_dir))
    for place in places:
        for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
            # Without "..", whatever links lie on the way.
            path = Path(os.path.abspath(place / spelling))
            inside = path.is_relative_to(root) and not PureWindowsPath(name).drive
            if inside and (found := _spelt(path)):
                return Picture(found, roots=(data_dir, place))
        reachable |= inside
    shown = name if len(name) < 200 else f"{name[:200]}..."
    if not reachable:
        way = "give a folder that holds both as --data_dir"
        if Path(name).is_absolute() or PureWindowsPath(name).drive:
            way = "write it as it lies in that folder"
        what = f"{shown} lies outside {data_dir}: {way}"
        raise Unfit("the name of its picture leads out of the data set", what)
    raise Unfit("its picture is missing", f"no {shown} in {data_dir}")


def forget() -> None:
    """Forgets what folders hold, so that they are listed anew."""
    _listing.cache_clear()


def polygons(parts: Any) -> tuple[list[list[float]], int]:
    """COCO's polygons as flat lists, and how many were dropped that have under three corners.

    A flat list of numbers is one polygon, and so is a list of corners [x, y].

    Raises:
        Unfit: none is left.
        ValueError, TypeError: they are no polygons.
    """
    if not isinstance(parts, list | tuple):
        raise ValueError(f"segmentation must be polygons or run lengths, not {short(parts)}")
    if all(isinstance(value, int | float) for value in parts) or (
        len(parts) > 2 and all(_is_corner(part) for part in parts)
    ):
        parts = [parts]
    kept = []
    for part in parts:
        if isinstance(part, list | tuple) and part and all(map(_is_corner, part)):
            part = [value for corner in part for value in corner]
        if not isinstance(part, list | tuple):
            raise ValueError(f"a polygon must be [x, y, x, y, ...], not {short(part)}")
        if is_sliver(part):
            continue
        if len(part) % 2 or not all(type(value) in (int, float) for value in part):
            raise ValueError(f"a polygon must be [x, y, x, y, ...], not {short(part)}")
        if len({tuple(part[i : i + 2]) for i in range(0, len(part), 2)}) > 2:
            kept.append(list(part))
    if not kept:
        raise Unfit("its polygons have under three corners")
    return kept, len(parts) - len(kept)


def dropped(slivers: int) -> tuple[str, ...]:
    return ("parts of it with under three corners were dropped",) if slivers else ()


def bounds(parts: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """xyxy around flat polygons."""
    corners = np.concatenate([np.reshape(part, (-1, 2)) for part in parts])
    return (*corners.min(0).tolist(), *corners.max(0).tolist())


def _is_corner(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return all(type(v) in (int, float) for v in value)


def _spelt(path: Path) -> Path | None:
    """A file of that name, or the only one that differs from it in large and small letters or in
    how accents are written."""
    try:
        if path.is_file():
            return path
    except OSError:  # such as a name that is too long
        return None
    folder = path.parent if path.parent.is_dir() else _spelt_folder(path.parent)
    names = _listing(folder).get(_plain(path.name), []) if folder is not None else []
    return folder / names[0] if len(names) == 1 and (folder / names[0]).is_file() else None


def _spelt_folder(path: Path) -> Path | None:
    if path.is_dir():
        return path
    if path == path.parent or (above := _spelt_folder(path.parent)) is None:
        return None
    names = _listing(above).get(_plain(path.name), [])
    return above / names[0] if len(names) == 1 and (above / names[0]).is_dir() else None


@functools.lru_cache(256)
def _listing(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    try:
        for entry in folder.iterdir():
            names.setdefault(_plain(entry.name), []).append(entry.name)
    except OSError:
        pass
    return names


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
