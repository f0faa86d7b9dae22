"""Mask IoU, boundary IoU and upsampling on golden's mask pairs and logits."""

import json
import re

import numpy as np
import pytest

from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards.segment import boundary_iou, mask_iou


@pytest.fixture(scope="module")
def pairs(golden_dir):
    """Golden's rows, and all their masks on one canvas: logits [B, 1, H, W], masks, valid."""
    rows = json.loads((golden_dir / "metrics.json").read_text())["pairs"]
    with np.load(golden_dir / "metrics.npz") as arrays:
        # The truth is where the mask is 1: 255 marks what is to be ignored.
        predicted = [arrays[f"pred_{row['pair']}"] == 1 for row in rows]
        truth = [arrays[f"gt_{row['pair']}"] == 1 for row in rows]
    sizes = np.array([mask.shape for mask in truth])
    canvas = tuple(sizes.max(0) + 3)
    logits = np.full((len(rows), 1, *canvas), 7.0, np.float32)  # beyond the picture: not counted
    masks = np.ones((len(rows), *canvas), bool)
    for i, (height, width) in enumerate(sizes):
        logits[i, 0, :height, :width] = np.where(predicted[i], 1, -1)
        masks[i, :height, :width] = truth[i]
    return rows, logits, masks, valid_pixels(sizes, canvas)


def test_mask_iou(pairs):
    rows, *masks = pairs
    official = [row["train_mask_iou"] for row in rows]
    np.testing.assert_allclose(mask_iou(*masks)[:, 0], official, rtol=1e-6, atol=1e-7)


def test_boundary_iou(pairs):
    """Where neither mask has a boundary the official code returns a bare 1 and fails; ours is 1."""
    rows, *masks = pairs
    official = [row["boundary_iou"] for row in rows]
    official = [1 if isinstance(value, dict) else value for value in official]
    np.testing.assert_allclose(boundary_iou(*masks)[:, 0], official, rtol=1e-6, atol=1e-7)


def test_upsampling(golden_dir):
    with np.load(golden_dir / "preprocessing.npz") as arrays:
        arrays = dict(arrays)
    logits = arrays["lowres_logits"]
    sizes = [
        tuple(map(int, match.groups()))
        for match in map(re.compile(r"postprocess_(\d+)x(\d+)(?:_idx)?$").match, arrays)
        if match
    ]
    assert sizes
    canvas = tuple(np.max(sizes, 0) + 2)
    repeated = np.repeat(logits, len(sizes), axis=0)
    ours = np.asarray(upsample_logits(repeated, np.array(sizes), canvas))
    for (height, width), image in zip(sizes, ours, strict=True):
        crop, name = image[:, :height, :width], f"postprocess_{height}x{width}"
        if name in arrays:
            official = arrays[name].reshape(crop.shape)
        else:
            crop, official = crop.reshape(-1)[arrays[f"{name}_idx"]], arrays[f"{name}_val"]
        np.testing.assert_allclose(crop, official, rtol=1e-5, atol=1e-4)
