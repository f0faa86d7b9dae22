"""Images as the two models see them: Qwen's patches in window order, SAM's plain square."""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from lens_jax.models.geometry import ImageGeometry

UNIT = ImageGeometry().unit_size
MAX_ASPECT = 200
MIN_PIXELS, MAX_PIXELS = 3136, 1_000_000
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of Qwen's images, red, green, blue in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def smart_resize(
    height: int,
    width: int,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    unit: int = UNIT,
) -> tuple[int, int]:
    """The size (height, width) an image is resized to: multiples of `unit`, area within limits.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(
            f"a picture of {width} x {height} pixels: absolute aspect ratio must be smaller than "
            f"{MAX_ASPECT}, got {max(height, width) / min(height, width)}"
        )
    h = max(unit, round(height / unit) * unit)
    w = max(unit, round(width / unit) * unit)
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(unit, math.floor(height / beta / unit) * unit)
        w = max(unit, math.floor(width / beta / unit) * unit)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / unit) * unit
        w = math.ceil(width * beta / unit) * unit
    return h, w


def longest_side(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size (height, width) with the longest side scaled to `longest`, fractions cut off."""
    scale = longest / max(height, width)
    return int(height * scale), int(width * scale)


def resize(
    image: UInt8[np.ndarray, "H W 3"],
    size: tuple[int, int],
    method: Image.Resampling = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes to (height, width) with PIL, which antialiases."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), method))


def sam_pixels(
    image: UInt8[np.ndarray, "H W 3"], side: int, antialias: bool = True
) -> UInt8[np.ndarray, "A A 3"]:
    """SAM's input: the whole image on a square, aspect not kept, bilinear."""
    if antialias:
        return resize(image, (side, side), Image.Resampling.BILINEAR)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


@functools.lru_cache(64)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...]) -> Float[np.ndarray, "3 256"]:
    """Qwen's value of each byte in each channel: rescaled, then normalised, in float32."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def patchify(
    image: UInt8[np.ndarray, "H W 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    geometry: ImageGeometry = ImageGeometry(),  # noqa: B008 (frozen)
) -> tuple[Float[np.ndarray, "N C"], tuple[int, int]]:
    """Cuts a resized image into normalised patches.

    Returns:
        The patches, merged units row-major and each unit's patches row-major, a patch's values in
        the order (channel, time, row, column), the still image repeated in time; and the grid
        (rows, columns) of patches.
    """
    m, p = geometry.merge_size, geometry.patch_size
    rows, columns = image.shape[0] // p, image.shape[1] // p
    cut = image.reshape(rows // m, m, p, columns // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    cut = cut.reshape(rows * columns, 3, p * p)
    table = _normalization(tuple(mean), tuple(std))
    patches = np.empty((rows * columns, 3, geometry.temporal_patch_size, p * p), np.float32)
    for channel in range(3):
        patches[:, channel] = table[channel][cut[:, channel]][:, None]
    return patches.reshape(rows * columns, -1), (rows, columns)


@functools.lru_cache(512)
def window_layout(
    grid: tuple[int, int], window_units: int, merge_size: int = 2
) -> tuple[Int[np.ndarray, "W S"], Int[np.ndarray, "W S 2"], Int[np.ndarray, "units"]]:
    """Where each patch goes: windows one after the other, each with its units row-major.

    A row of slots holds a window, or several of the smaller ones at the border: in rows of their
    own they would leave a fifth of the slots of a 640 x 480 image empty.

    Args:
        grid: (rows, columns) of patches.
        window_units: a window's side in merged units.

    Returns:
        The patch (as `patchify` orders them) of each slot, -1 for padding; the (row, column) of
        each slot's patch, 0 for padding; and the flat slot, in units, of each unit in row-major
        order, which is the order of the image tokens. Read-only, for they are shared.
    """
    m, u = merge_size, window_units
    rows, columns = grid[0] // m, grid[1] // m
    picture = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    windows = [
        picture[top : top + u, left : left + u].reshape(-1)
        for top in range(0, rows, u)
        for left in range(0, columns, u)
    ]
    held = [np.concatenate(row) for row in _first_fit(windows, u * u)]
    units = np.stack([np.pad(x, (0, u * u - len(x)), constant_values=-1) for x in held])
    count, units = len(units), units.reshape(-1)
    slot_of_unit = np.empty(rows * columns, np.int32)
    slot_of_unit[units[units >= 0]] = np.flatnonzero(units >= 0)

    source = np.where(units[:, None] >= 0, units[:, None] * m * m + np.arange(m * m), -1)
    source = source.reshape(count, u * u * m * m).astype(np.int32)
    row = units // columns * m
    column = units % columns * m
    inner = np.arange(m * m)
    positions = np.stack(
        [row[:, None] + inner // m, column[:, None] + inner % m], axis=-1, dtype=np.int32
    ).reshape(*source.shape, 2)
    positions[source < 0] = 0
    for array in (source, positions, slot_of_unit):
        array.flags.writeable = False
    return source, positions, slot_of_unit


def _first_fit(windows: Sequence[np.ndarray], size: int) -> list[list[np.ndarray]]:
    """Rows of at most `size` elements together, the largest windows placed first."""
    rows: list[list[np.ndarray]] = []
    free: list[int] = []
    for window in sorted(windows, key=len, reverse=True):
        row = next((i for i, left in enumerate(free) if len(window) <= left), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(size)
        rows[row].append(window)
        free[row] -= len(window)
    return rows


def arrange_windows(
    patches: Float[np.ndarray, "N C"], source: Int[np.ndarray, "W S"]
) -> tuple[Float[np.ndarray, "W S C"], Bool[np.ndarray, "W S"]]:
    """Puts patches into their slots (`source` of `window_layout`); padding is zero and masked."""
    mask = source >= 0
    arranged = patches[np.maximum(source, 0)]
    arranged[~mask] = 0.0
    return arranged, mask


def is_shrunken(size: tuple[int, ...], canvas: tuple[int, int]) -> bool:
    """Whether `fit_mask` makes a mask of `size` smaller; both are (height, width)."""
    return size[0] > canvas[0] or size[1] > canvas[1]


def fit_mask(mask: Bool[np.ndarray, "H W"], canvas: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The mask itself if it fits on the canvas (height, width), else shrunken to fit, nearest."""
    height, width = mask.shape
    if not is_shrunken(mask.shape, canvas):
        return mask
    scale = min(canvas[0] / height, canvas[1] / width)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    rows = ((np.arange(h) + 0.5) * height / h).astype(int)
    columns = ((np.arange(w) + 0.5) * width / w).astype(int)
    return mask[rows[:, None], columns[None, :]]


def upsample_logits(
    logits: Float[np.ndarray, "h w"], size: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Mask logits at another size (height, width), on the host.

    Bilinear with pixel centres (align_corners False) and without antialiasing, in float32, as the
    official evaluation does.
    """
    logits = np.asarray(logits, np.float32)
    for axis in (0, 1):
        length = logits.shape[axis]
        place = (np.arange(size[axis], dtype=np.float32) + np.float32(0.5)) * np.float32(
            length / size[axis]
        ) - np.float32(0.5)
        place = np.maximum(place, 0)
        low = np.minimum(place.astype(np.int64), length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = np.expand_dims(place - low, 1 - axis).astype(np.float32)
        logits = (1 - weight) * logits.take(low, axis) + weight * logits.take(high, axis)
    return logits
