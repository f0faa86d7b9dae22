"""Prompts and examples, one image and one expression each, padded to batches of static shapes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from lens_jax.data import images
from lens_jax.data.buckets import Buckets, Needs, smallest
from lens_jax.models.inputs import Batch, Prompts, Targets


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt before it is padded to a bucket; a row of `Prompts`, with its sizes."""

    patches: Float[np.ndarray, "W S C"]
    patch_positions: Int[np.ndarray, "W S 2"]
    patch_mask: Bool[np.ndarray, "W S"]
    tokens: Int[np.ndarray, "P"]
    image_index: Int[np.ndarray, "P"]
    positions: Int[np.ndarray, "3 P"]
    next_position: int
    sam_pixels: UInt8[np.ndarray, "A A 3"]
    image_size: tuple[int, int]  # (height, width) of the image as given
    coordinate_scale: tuple[int, int]  # what the text's (y, x) run to


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its targets, before padding."""

    prompt: Prompt
    box: Float[np.ndarray, "4"]  # as the text writes it; zeros if the sample has none
    mask: Bool[np.ndarray, "H W"]
    answer: Int[np.ndarray, "T"]

    @property
    def needs(self) -> Needs:
        prompt = self.prompt
        return Needs(len(prompt.patches), len(prompt.tokens), len(self.answer))


def stack_prompts(rows: Sequence[Prompt], buckets: Buckets | None = None) -> Prompts:
    """Pads prompts to one static shape, tokens on the right, windows at the end.

    Raises:
        ValueError: a row is larger than the largest bucket.
    """
    windows = max(len(row.patches) for row in rows)
    length = max(len(row.tokens) for row in rows)
    if buckets is not None:
        windows = smallest(buckets.windows, windows, "windows")
        length = smallest(buckets.prompt_tokens, length, "prompt_tokens")
    count, (slots, channels) = len(rows), rows[0].patches.shape[1:]
    side = rows[0].sam_pixels.shape[0]
    batch = Prompts(
        patches=np.zeros((count, windows, slots, channels), np.float32),
        patch_positions=np.zeros((count, windows, slots, 2), np.int32),
        patch_mask=np.zeros((count, windows, slots), bool),
        tokens=np.zeros((count, length), np.int32),
        image_index=np.full((count, length), -1, np.int32),
        length=np.array([len(row.tokens) for row in rows], np.int32),
        positions=np.zeros((count, 3, length), np.int32),
        next_position=np.array([row.next_position for row in rows], np.int32),
        sam_pixels=np.empty((count, side, side, 3), np.uint8),
    )
    for i, row in enumerate(rows):
        w, p = len(row.patches), len(row.tokens)
        batch.patches[i, :w] = row.patches
        batch.patch_positions[i, :w] = row.patch_positions
        batch.patch_mask[i, :w] = row.patch_mask
        batch.tokens[i, :p] = row.tokens
        batch.image_index[i, :p] = row.image_index
        batch.positions[i, :, :p] = row.positions
        batch.sam_pixels[i] = row.sam_pixels
    return batch


def stack_targets(rows: Sequence[Example], buckets: Buckets) -> Targets:
    """Pads targets to one static shape; a mask larger than every canvas is shrunken to the largest.

    Raises:
        ValueError: an answer is longer than the largest bucket.
    """
    masks = [images.fit_mask(row.mask, buckets.largest_canvas) for row in rows]
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    canvas = min(c for c in buckets.canvas if c[0] >= height and c[1] >= width)
    longest = max(len(row.answer) for row in rows)
    length = smallest(buckets.answer_tokens, longest, "answer_tokens")
    targets = Targets(
        box=np.stack([row.box for row in rows]),
        mask=np.zeros((len(rows), *canvas), bool),
        mask_size=np.array([mask.shape for mask in masks], np.int32),
        answer=np.zeros((len(rows), length), np.int32),
        answer_length=np.array([len(row.answer) for row in rows], np.int32),
    )
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        targets.mask[i, : mask.shape[0], : mask.shape[1]] = mask
        targets.answer[i, : len(row.answer)] = row.answer
    return targets


def stack(rows: Sequence[Example], sample_ids: Sequence[int], buckets: Buckets) -> Batch:
    """A batch of one static shape."""
    return Batch(
        prompts=stack_prompts([row.prompt for row in rows], buckets),
        targets=stack_targets(rows, buckets),
        sample_id=np.array(sample_ids, np.int32),
    )
