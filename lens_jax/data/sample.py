"""One picture with one object in it, the sentences that name it, and the truth about it."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps

# Pictures of 90 to 179 megapixels are fine; from there on Pillow refuses them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class SampleError(Exception):
    """A sample that cannot be read; the text names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """`box` is xyxy in pixels of `image`, None where the data set has none; together with an empty
    mask that says that nothing in the picture is meant.

    The last two say how a data set's pictures are prepared: the language model's is first resized
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


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes a picture to RGB, as `to_rgb` does.

    Raises:
        SampleError: the file is missing, damaged, or not a picture.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise SampleError(f"{path}: no such picture") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise SampleError(f"{path}: not a readable picture ({error})") from error


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as a viewer shows it: upright as its EXIF orientation says, the first frame of
    several, what is transparent on white, 16-bit grey by its upper 8 bits.

    Raises:
        ValueError: pixels of 32 bits, whose range nothing tells, or none at all.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.asarray(image.convert("RGB"))
    if not pixels.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    return pixels
