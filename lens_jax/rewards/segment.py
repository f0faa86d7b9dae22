"""How well a mask covers the truth, at the picture's own size (LENS, segment level)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_EPS = 1e-6


def mask_iou(
    logits: Float[Array, "B G H W"], mask: Bool[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> Float[Array, "B G"]:
    """IoU of the masks (logit > 0) with the truth over the valid pixels; 0 where both are empty."""
    predicted, mask = _masks(logits, mask, valid)
    intersection = _area(predicted & mask)
    return intersection / (_area(predicted) + _area(mask) - intersection + _EPS)


def boundary_iou(
    logits: Float[Array, "B G H W"], mask: Bool[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> Float[Array, "B G"]:
    """IoU of the masks' inner boundaries (arXiv 2103.16562); 1 where neither has one.

    The boundary is what erosion by a square takes away; its side is a twentieth of the picture's
    shorter side, made odd. Beyond the picture's border counts as inside.
    """
    predicted, mask = _masks(logits, mask, valid)
    height, width = valid.any(2).sum(1), valid.any(1).sum(1)
    side = jnp.minimum(height, width) // 20
    radius = (side + (side % 2 == 0)) // 2
    predicted = predicted & _near_background(predicted, valid, radius)
    mask = mask & _near_background(mask, valid, radius)
    union = _area(predicted | mask)
    return jnp.where(union == 0, 1.0, _area(predicted & mask) / (union + _EPS))


def _masks(logits, mask, valid) -> tuple[Bool[Array, "B G H W"], Bool[Array, "B 1 H W"]]:
    return (logits > 0) & valid[:, None], (mask & valid)[:, None]


def _area(mask: Bool[Array, "*N H W"]) -> Float[Array, "*N"]:
    return mask.sum((-2, -1)).astype(jnp.float32)


def _near_background(
    mask: Bool[Array, "B G H W"], valid: Bool[Array, "B H W"], radius: Int[Array, "B"]
) -> Bool[Array, "B G H W"]:
    """Whether a square of the given radius around a pixel holds valid pixels outside the mask."""
    offsets = (jnp.arange(n)[:, None] - jnp.arange(n) for n in mask.shape[-2:])
    rows, columns = (jnp.abs(offset) <= radius[:, None, None] for offset in offsets)
    outside = valid[:, None] & ~mask
    # Zeros and ones: counted exactly in any precision.
    for band, product in ((rows, "byh,bghw->bgyw"), (columns, "bxw,bgyw->bgyx")):
        outside = jnp.einsum(product, band.astype(jnp.float32), outside.astype(jnp.float32)) > 0
    return outside
