"""COCO's masks, run lengths and polygons, from files that nobody vouches for.

pycocotools trusts its input: run lengths that do not add up make it read and write out of bounds,
and it walks along a polygon's edges pixel by pixel, however long they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as coco_mask

LONGEST = 10_000_000  # pixels along the edges of one polygon
LARGEST = 2**30  # pixels of a mask


def decode_runs(rle: Any, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of a run-length encoding, its counts whole numbers or compressed.

    Args:
        size: (height, width) that it must be for.

    Raises:
        ValueError: it is none, is for another size, or its counts do not add up to it.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise ValueError('expected {"size": [height, width], "counts": ...}')
    counts, (height, width) = rle["counts"], size
    if not isinstance(rle["size"], list | tuple) or list(rle["size"]) != [height, width]:
        raise ValueError(f"encoded for {str(rle['size'])[:60]} instead of {[height, width]}")
    if height * width > LARGEST:
        raise ValueError(f"{width} x {height} pixels are too many for a mask")
    if isinstance(counts, str | bytes):
        counts = _decompressed(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(
        type(n) in (int, float) and n >= 0 and n == n // 1 for n in counts
    ):
        raise ValueError("counts must be whole numbers of at least 0, or a string")
    counts = [int(n) for n in counts]
    if sum(counts) != height * width:
        raise ValueError(f"counts add up to {sum(counts)} pixels instead of {height * width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def encode_runs(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """The compressed run-length encoding of a mask, as JSON holds it."""
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": runs["counts"].decode("ascii")}


def draw_polygons(
    polygons: Sequence[Float[np.ndarray, "N 2"]], size: tuple[int, int]
) -> UInt8[np.ndarray, "H W"]:
    """How many polygons of corners (x, y) cover each pixel, 255 at most; edges may leave the
    image. One of fewer than 3 corners covers nothing.

    Raises:
        ValueError: a corner lies more than two sides away, or is no number; a polygon runs to and
            fro too often.
    """
    # pycocotools would take all of them for boxes if the first had two corners.
    polygons = [corners for corners in polygons if len(corners) > 2]
    for corners in polygons:
        far = ~(np.abs(corners) <= 2 * max(size))
        if far.any():
            raise ValueError(f"a corner at {corners[far.any(1)][0].tolist()} is far outside")
        if np.abs(np.diff(corners, axis=0)).sum() > LONGEST:
            raise ValueError("a polygon runs to and fro too often")
    count = np.zeros(size, np.uint8)
    if not polygons:
        return count
    for runs in coco_mask.frPyObjects([c.ravel().tolist() for c in polygons], *size):
        count += coco_mask.decode(runs) & (count < 255)
    return count


def _decompressed(text: bytes) -> list[int]:
    """COCO's compressed counts: five bits a character, and differences to the count before last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError("counts is no compressed run-length encoding")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts is cut off")
    return counts
