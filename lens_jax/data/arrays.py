"""Images as programs hand them over: paths, PIL images, arrays in several layouts."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from lens_jax.data.sample import LEAST_OF_16_BITS, SampleError, read_image, to_rgb
from lens_jax.files import as_typed
from lens_jax.progress import counted

CHANNELS = (1, 3, 4)


def to_picture(image: Any) -> UInt8[np.ndarray, "H W 3"]:
    """An image in RGB, upright as its file's EXIF orientation says.

    Args:
        image: the path of a file, a PIL image, or an array [H, W], [H, W, 1 | 3 | 4] or
            [1 | 3 | 4, H, W] of grey, RGB or RGBA values: bool (True is white), uint8, uint16 (0 to
            65,535) or floating, bfloat16 included (0 to 1). RGBA is laid on white.

    Raises:
        ValueError: it is none of these, cannot be read, or may be read in several ways: where first
            and last axis both have 1, 3 or 4 entries, either may be the channels; where the largest
            value of uint16 is below 32,768 (and not 0), a camera may have counted to less than
            65,535. Scale such values to 0..255 and give uint8.
    """
    if isinstance(image, (str, os.PathLike)):
        if not os.fspath(image):
            raise ValueError("the path of the picture is empty")
        try:
            return read_picture(Path(image))
        except SampleError as error:
            raise ValueError(str(error)) from error
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow reads the pixels only now
            raise ValueError(f"the picture cannot be read: {error}") from error
    if not hasattr(image, "__array__"):
        raise ValueError(
            f"a picture is a path, a PIL image or an array, not {type(image).__name__}"
            f"{_advice(image)}"
        )
    try:
        array = np.asarray(image)
    except Exception as error:  # a tensor on an accelerator, for example
        raise ValueError(f"the picture is no array: {' '.join(str(error).split())}") from error
    return to_rgb(Image.fromarray(_to_bytes(_channels_last(array))))


def read_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """`read_image` of a regular file; nothing is waited for that a pipe may send.

    Raises:
        SampleError: there is none, or it is no image.
    """
    check_is_file(path)
    return read_image(path)


def check_is_file(path: Path) -> None:
    """Raises SampleError for anything but a regular file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a null character, for example
        named = f"{path}" if len(str(path)) < 300 else f"{str(path)[:100]}..."
        if re.search(r"(^|/)([a-z][a-z0-9+]{1,9}:/|data:)", str(path)):  # Path makes // one /
            reason = "an address, not a file: download the picture and give its path"
        elif isinstance(error, FileNotFoundError):
            reason = "no such picture"
        elif isinstance(error, OSError):
            reason = f"cannot be opened ({error.strerror})"
        else:
            reason = "no file has such a name"
        raise SampleError(f"{as_typed(named)}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise SampleError(f"{path}: a folder, not a picture")
    if not stat.S_ISREG(mode):
        raise SampleError(f"{path}: a pipe or device, not a picture")


def _advice(image: Any) -> str:
    """How to make an image of what is often given for one."""
    if isinstance(image, bytes | bytearray | memoryview):
        return ": read it with PIL.Image.open(io.BytesIO(...))"
    if hasattr(image, "read"):
        return ": read it with PIL.Image.open"
    if isinstance(image, list | tuple):
        return ": make it one with numpy.array(..., numpy.uint8); several go to segment_batch"
    return ""


def _channels_last(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "H W C"]:
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and shape[0] in CHANNELS:
        if shape[-1] in CHANNELS:
            raise ValueError(
                f"the channels of an array of shape {shape} may be the first axis or the last: "
                "give a PIL image"
            )
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 4:
        raise ValueError(
            f"an array of shape {shape} holds {counted(shape[0], 'picture')}: give one of them, or "
            "give all of them to segment_batch, with a list of sentences"
        )
    if array.ndim != 3 or array.shape[-1] not in CHANNELS:
        raise ValueError(
            f"an array of shape {shape} is no picture: give [H, W, 3], [H, W] or [3, H, W]"
        )
    if not array.size:
        raise ValueError(f"an array of shape {shape} has no pixels")
    return array


def _to_bytes(array: Shaped[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "H W ..."]:
    if array.dtype.name == "bfloat16":  # as models of other libraries compute
        array = array.astype(np.float32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    kind = array.dtype
    if kind == np.bool_:
        array = array.astype(np.uint8) * 255
    elif kind == np.uint16:
        most = int(array.max())
        if 0 < most < LEAST_OF_16_BITS:
            raise ValueError(
                f"16-bit values up to {most} may be those of 8, 10, 12, 14 or 16 bits: "
                "scale them to 0..255 and give uint8"
            )
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(kind, np.floating):
        least, most = float(array.min()), float(array.max())
        if np.isnan(most):
            raise ValueError("floating values are to be 0 to 1, and some are not a number (NaN)")
        if not (least >= 0 and most <= 1):
            raise ValueError(
                f"floating values are to be 0 to 1, not {least:.4g} to {most:.4g}: "
                "scale them to 0..255 and give uint8"
            )
        array = np.round(array.astype(np.float32) * 255).astype(np.uint8)
    elif not np.issubdtype(kind, np.integer):
        raise ValueError(f"an array of {kind} is no picture: give uint8, 0 to 255")
    elif kind != np.uint8:
        raise ValueError(f"an array of {kind} may hold any range: give uint8, 0 to 255")
    return np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)
