"""Values of annotations from files that nobody vouches for, read for what they must be.

Each function raises ValueError, which says in one line what is wrong with the value.
"""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lens_jax.data import boxes

LARGEST = 1e9  # of any coordinate; larger ones have no place in an image
LONGEST_NAME = 1000  # characters of a file's name with its folders
LARGEST_PICTURE = 2**28  # pixels, more than Pillow decodes


def whole_number(value: Any, what: str) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or abs(value) > LARGEST:
        raise ValueError(f"{what} must be a whole number, not {short(value)}")
    return value


def picture_size(annotation: Mapping[str, Any], height: str, width: str) -> tuple[int, int]:
    """An image's (height, width), which an annotation says under these keys."""
    size = tuple(whole_number(annotation.get(key), key) for key in (height, width))
    if min(size) < 1 or size[0] * size[1] > LARGEST_PICTURE:
        raise ValueError(f"{height} {size[0]} and {width} {size[1]} are no picture's")
    return size


def numbers(values: Any, count: int, what: str) -> tuple[float, ...]:
    """So many finite numbers."""
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(f"{what} must be {count} numbers, not {short(values)}")
    if not all(type(v) in (int, float) and -LARGEST < v < LARGEST for v in values):
        raise ValueError(f"{what} must be {count} finite numbers, not {short(values)}")
    return tuple(map(float, values))


def sentence(value: Any, what: str = "a sentence") -> str:
    """Text in Unicode with something in it that can be seen."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {short(value)}")
    if is_blank(value):
        raise ValueError(f"{what} is empty")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{what} is no Unicode text: {short(value)}")
    return value


def is_blank(text: str) -> bool:
    """Whether nothing in it can be seen."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def sentences(values: Any, what: str = "`sentences`") -> tuple[str, ...]:
    """One sentence or more. A single one may stand where a list is expected."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{what} must be a list of at least one sentence, not {short(values)}")
    return tuple(sentence(value, f"a sentence of {what}") for value in values)


def inside(folder: Path, name: Any, what: str) -> Path:
    """Where a file lies that an annotation names: below `folder`, whatever it says.

    Links in `folder` are followed: those are its owner's.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or len(name) > LONGEST_NAME:
        raise ValueError(f"{what} must be a file's name, not {short(name)}")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise ValueError(
                f"{what}: {short(name)} leads out of the data set; give a name inside it"
            )
    return folder / name


def fitting_box(
    box: Sequence[float] | None, mask: Bool[np.ndarray, "H W"], what: str
) -> Float[np.ndarray, "4"] | None:
    """The box xyxy of a mask's object; None where neither is there: nothing is meant."""
    if not mask.any():
        if box is None or not any(np.subtract(box[2:], box[:2])):
            return None
        raise ValueError(f"{what} {list(box)} holds an object, but the mask has no pixel")
    if box is None:
        raise ValueError(f"{what} is missing, but the mask has pixels")
    x0, y0, x1, y1 = box
    if x0 >= x1 or y0 >= y1:
        raise ValueError(f"{what} [{x0}, {y0}, {x1}, {y1}] (xyxy) has no area")
    if min(x0, y0) >= 0 and max(x1, y1) <= 1 and max(mask.shape) > 2:
        raise ValueError(f"{what} {list(box)} (xyxy) is in fractions; give pixels")
    if not boxes.touch(box, boxes.mask_box(mask)):
        raise ValueError(f"{what} {list(box)} (xyxy) does not touch the mask")
    return np.array(box, np.float64)


def check_size(stated: tuple[int, int] | None, found: tuple[int, ...], orientation: str) -> None:
    """Compares (height, width) of an annotation, where it says them, with those of its image."""
    if stated is not None and stated != found:
        raise ValueError(
            f"{found[1]} x {found[0]} pixels ({orientation}), but its annotation says "
            f"{stated[1]} x {stated[0]}"
        )


def short(value: Any) -> str:
    """A value as a message shows it: on one line, its middle cut out."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlong = 20
