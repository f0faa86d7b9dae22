"""One picture with one object in it, the sentences that name it, and the truth about it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image


class SampleError(Exception):
    """A sample that cannot be read; the text names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """`box` is xyxy in pixels of `image`, None where the data set has none.

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
    """Decodes a picture to RGB.

    Raises:
        SampleError: the file is missing, damaged, or not a picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise SampleError(f"{path}: no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"{path}: not a readable picture ({error})") from error
