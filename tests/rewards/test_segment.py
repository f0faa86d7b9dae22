"""Mask and boundary IoU on canvases, and the resampling that brings logits there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards import segment

torch = pytest.importorskip("torch")
F = torch.nn.functional

mask_iou, boundary_iou = jax.jit(segment.mask_iou), jax.jit(segment.boundary_iou)
SIZES = [(48, 64), (64, 41), (7, 64), (20, 20), (61, 45), (1, 1)]
CANVAS = (64, 64)


def blobs(rng, shape) -> np.ndarray:
    """Smooth random logits [.., H, W]."""
    low = rng.standard_normal((*shape[:-2], 6, 6))
    low = torch.tensor(low.reshape(-1, 1, 6, 6))
    return F.interpolate(low, shape[-2:], mode="bicubic").numpy().reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def canvases():
    """Logits [B, G, H, W], masks, valid pixels; junk beyond the true sizes."""
    rng = np.random.default_rng(0)
    logits = blobs(rng, (len(SIZES), 3, *CANVAS))
    masks = blobs(rng, (len(SIZES), *CANVAS)) > 0
    logits[:, 2] = np.where(masks, 1, -1) + 0.6 * logits[:, 2]
    return logits, masks, np.asarray(valid_pixels(jnp.array(SIZES), CANVAS))


def iou(a, b, eps=1e-6):
    return (a & b).sum() / ((a | b).sum() + eps)


def boundary(mask: np.ndarray) -> np.ndarray:
    side = min(mask.shape) // 20
    side += side % 2 == 0
    outside = torch.tensor(~mask, dtype=torch.float32)[None, None]
    return mask & (F.max_pool2d(outside, side, 1, side // 2)[0, 0].numpy() > 0)


def test_valid_pixels(canvases):
    _, _, valid = canvases
    for pixels, (height, width) in zip(valid, SIZES, strict=True):
        assert pixels[:height, :width].all()
        assert pixels.sum() == height * width


def test_ious_are_those_of_the_cropped_masks(canvases):
    logits, masks, valid = canvases
    ours = np.asarray(mask_iou(logits, masks, valid))
    edges = np.asarray(boundary_iou(logits, masks, valid))
    for b, (height, width) in enumerate(SIZES):
        truth = masks[b, :height, :width]
        for g in range(logits.shape[1]):
            predicted = logits[b, g, :height, :width] > 0
            np.testing.assert_allclose(ours[b, g], iou(predicted, truth), rtol=1e-6)
            a, c = boundary(predicted), boundary(truth)
            np.testing.assert_allclose(edges[b, g], iou(a, c) if (a | c).any() else 1, rtol=1e-6)
    assert ((ours > 0.1) & (ours < 0.9)).any() and ((edges > 0.1) & (edges < 0.9)).any()


def test_boundaries_at_the_picture_border_do_not_count():
    """A mask that fills the picture has none; on a canvas the padding is no background either."""
    size = jnp.array([(50, 60)])
    valid = valid_pixels(size, CANVAS)
    full, empty = jnp.ones((1, 1, *CANVAS)), -jnp.ones((1, 1, *CANVAS))
    half = full.at[..., :25, :].set(-1)
    assert boundary_iou(full, valid, valid) == 1
    assert boundary_iou(half, half[:, 0] > 0, valid) == pytest.approx(1)
    assert boundary_iou(half, valid, valid) == 0
    assert boundary_iou(empty, jnp.zeros_like(valid), valid) == 1


def test_empty_masks_have_no_iou():
    size = jnp.array([(50, 60)])
    valid = valid_pixels(size, CANVAS)
    empty = -jnp.ones((1, 1, *CANVAS))
    assert mask_iou(empty, jnp.zeros_like(valid), valid) == 0
    # What lies beyond the picture is no mask.
    assert mask_iou(jnp.where(valid[:, None], -1.0, 1.0), ~valid, valid) == 0


def test_nothing_is_the_right_answer_where_nothing_is_meant():
    """An empty true mask says so if there is no box; one that shrank to nothing has its box."""
    size = jnp.array([(50, 60)] * 3)
    valid = valid_pixels(size, CANVAS)
    box = jnp.array([[0, 0, 0, 0], [3, 3, 4, 4], [0, 0, 0, 0]], jnp.float32)
    mask = ~valid  # beyond the picture: no mask
    mask = mask.at[2, 7, 7].set(True)
    nothing = segment.no_target(mask, box, valid)
    np.testing.assert_array_equal(nothing, [True, False, False])
    empty = jnp.where(valid, -1.0, 1.0)
    logits = jnp.stack([empty, empty.at[:, 7, 7].set(1)], axis=1)
    ours = segment.answer_iou(logits, mask, valid, nothing)
    np.testing.assert_allclose(ours, [[1, 0], [0, 0], [0, 1]], rtol=1e-5)


def test_what_has_no_boundary_is_compared_otherwise():
    """An empty mask, one that fills the picture, and any in a small picture."""
    size = jnp.array([(50, 60), (30, 60)])
    valid = valid_pixels(size, CANVAS)
    full, empty = jnp.ones(CANVAS), -jnp.ones(CANVAS)
    half = full.at[:, :20].set(-1)
    logits = jnp.array([[full, empty, half], [half, empty, full]])
    whole = mask_iou(logits, valid, valid)
    edges = boundary_iou(logits, valid, valid, otherwise=whole)
    np.testing.assert_allclose(edges, [[1, 0, 0], [2 / 3, 0, 1]], rtol=1e-5)


@pytest.mark.parametrize("low", [(16, 16), (9, 24)])
def test_upsampling_is_torch_interpolate(low):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((len(SIZES), 2, *low)).astype(np.float32) * 10
    weights = rng.standard_normal((len(SIZES), 2, *CANVAS)).astype(np.float32)
    sizes = jnp.array(SIZES)
    valid = valid_pixels(sizes, CANVAS)[:, None]

    def total(logits):
        up = upsample_logits(logits, sizes, CANVAS)
        return jnp.sum(jnp.where(valid, up * weights, 0)), up

    (_, ours), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    for b, size in enumerate(SIZES):
        x = torch.tensor(logits[b, None], requires_grad=True)
        theirs = F.interpolate(x, size, mode="bilinear", align_corners=False)
        (theirs[0] * torch.tensor(weights[b, :, : size[0], : size[1]])).sum().backward()
        crop = ours[b, :, : size[0], : size[1]]
        np.testing.assert_allclose(crop, theirs[0].detach(), rtol=1e-5, atol=5e-5)
        np.testing.assert_allclose(gradient[b], x.grad[0], rtol=1e-4, atol=1e-4)
    assert ours.dtype == jnp.float32 and np.isfinite(ours).all()


def test_upsampling_without_a_group_axis():
    logits = jnp.arange(2 * 8 * 8, dtype=jnp.bfloat16).reshape(2, 8, 8)
    sizes = jnp.array([(16, 12), (5, 9)])
    alone = upsample_logits(logits, sizes, (16, 16))
    assert alone.dtype == jnp.float32
    np.testing.assert_array_equal(alone, upsample_logits(logits[:, None], sizes, (16, 16))[:, 0])
