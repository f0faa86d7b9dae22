"""One image with one object in it, the expressions that name it, its mask and its box."""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import EpsImagePlugin, ExifTags, Image, UnidentifiedImageError

# Images of 90 to 179 megapixels are fine; from there on Pillow refuses them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# PostScript is a program, which Pillow would have Ghostscript run.
EpsImagePlugin.gs_binary = False
# Blocks beside the pixels (EXIF, MPF, APNG, TIFF's tags) may be damaged; what hides pixels raises.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# Pillow knows these, and decodes them by programs of others or not at all.
UNREAD = {
    "EPS": "PostScript", "WMF": "a Windows metafile",
    "MPEG": "a film", "BUFR": "BUFR", "GRIB": "GRIB", "HDF5": "HDF5",
}  # fmt: skip
HEIC = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1")  # a file's bytes 8 to 12
# Cameras count up to 2**10 to 2**15 in 16 bits. What stays below this may be any of them.
LEAST_OF_16_BITS = 2**15

log = logging.getLogger("lens_jax")


class SampleError(Exception):
    """A sample that cannot be read; the text names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """`box` is xyxy in pixels of `image`, None where the data set has none; together with an empty
    mask that says that nothing in the image is meant.

    The last two say how a data set's images are prepared: the language model's is first resized
    to a `longest_side` (None: it is not), and SAM's is resized with or without `antialias`.
    """

    image: UInt8[np.ndarray, "H W 3"]
    expressions: tuple[str, ...]
    mask: Bool[np.ndarray, "H W"]
    box: Float[np.ndarray, "4"] | None
    ref_id: int
    image_id: int
    image_path: str
    longest_side: int | None = None
    antialias: bool = True


class Source(Protocol):
    """A data set: samples by index, read when asked for.

    Indexing raises `SampleError` for a sample that cannot be read. `num_expressions` says, without
    reading, how many sentences each sample has.
    """

    @property
    def num_expressions(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def read_image(
    path: Path, *, pixels: Literal["upright", "stored"] = "upright"
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image to RGB, as `to_rgb` does.

    Raises:
        SampleError: the file is missing, damaged, or not an image.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image, pixels=pixels)
    except FileNotFoundError:
        raise SampleError(f"{path}: no such picture") from None
    except UnidentifiedImageError:
        raise SampleError(f"{path}: not a readable picture ({_unknown(path)})") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise SampleError(f"{path}: not a readable picture ({error})") from error


def _unknown(path: Path) -> str:
    """Why Pillow knows no format for a file, and what to do."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        return "HEIC is not read: convert it to JPEG or PNG"
    return "its content is of no known format" if head else "the file is empty"


def to_rgb(
    image: Image.Image, *, pixels: Literal["upright", "stored"] = "upright"
) -> UInt8[np.ndarray, "H W 3"]:
    """An image as a viewer shows it: the first frame of several, what is transparent on white,
    16-bit grey by its upper 8 bits; where those stay dark, the log says so, once a file.

    Args:
        pixels: turned upright as the image's EXIF orientation says, or as its decoder gives them,
            for annotations that speak for those.

    Raises:
        ValueError: pixels of 32 bits, whose range nothing tells, or none at all; a format that is
            not read.
    """
    if image.format in UNREAD:
        raise ValueError(f"{UNREAD[image.format]} is not read: convert it to PNG")
    image.load()
    turned = orientation(image) if pixels == "upright" else 1
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.size and 0 < (most := int(values.max())) < LEAST_OF_16_BITS:
            _say_dark(str(getattr(image, "filename", "") or "a picture"), most)
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    array = np.asarray(image.convert("RGB"))
    if not array.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    return turn(array, turned)


@functools.lru_cache(4096)  # once a file
def _say_dark(name: str, most: int) -> None:
    log.warning(
        "%s: its 16-bit values end at %d and are divided by 256, which leaves it dark; if they are "
        "those of fewer bits, save it with 8 bits a channel",
        name,
        most,
    )


def orientation(image: Image.Image | str | Path) -> int:
    """An image's EXIF orientation, 1 to 8: how its stored pixels are turned to be upright.

    1, as they are, where there is none, or where the block is damaged or says anything else: that
    is how viewers show such images. A TIFF's is 1, too: Pillow turns it while decoding.

    Raises:
        SampleError: `image` is the path of no image.
    """
    if not isinstance(image, Image.Image):
        try:
            with Image.open(image) as opened:
                return orientation(opened)
        except FileNotFoundError:
            raise SampleError(f"{image}: no such picture") from None
        except Exception as error:
            raise SampleError(f"{image}: not a readable picture ({error})") from error
    if image.format in ("PNG", "TIFF"):  # a PNG's block may follow its pixels
        image.load()
    if image.format == "TIFF":  # Pillow removes what it has done, and older ones do nothing
        value = image.tag_v2.get(ExifTags.Base.Orientation)
        return value if type(value) is int and 1 <= value <= 8 else 1
    try:
        block = image.info.get("exif")
        if block is None:  # older PNG writers put it into a text, in hexadecimal digits
            profile = image.info.get("Raw profile type exif", "")
            block = bytes.fromhex("".join(profile.split("\n")[3:]))
        # Not Image.getexif, which takes XMP's orientation where EXIF has none; viewers do not.
        exif = Image.Exif()
        exif.load(block)
        value = exif.get(ExifTags.Base.Orientation)
    except Exception:  # what cameras and editors write raises nearly anything
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def turn(array: Shaped[np.ndarray, "h w ..."], orientation: int) -> Shaped[np.ndarray, "H W ..."]:
    """Stored pixels, of an image or of a mask, to upright ones."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def turn_box(
    box: Sequence[float], size: tuple[int, int], orientation: int
) -> Float[np.ndarray, "4"]:
    """A box xyxy on stored pixels to the same box on upright ones.

    Args:
        size: (height, width) of the stored image.
    """
    height, width = size
    x0, y0, x1, y1 = map(float, box)
    if orientation in (5, 6, 7, 8):
        x0, y0, x1, y1, height, width = y0, x0, y1, x1, width, height
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    if orientation in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    return np.array([x0, y0, x1, y1])
