"""Overlap of a mask and its target, at the image's own size (LENS, segment level)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_EPS = 1e-6


def mask_iou(
    logits: Float[Array, "B G H W"], mask: Bool[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> Float[Array, "B G"]:
    """IoU of the masks (logit > 0) with the target over valid pixels; 0 where both are empty."""
    predicted, mask = _masks(logits, mask, valid)
    intersection = _area(predicted & mask)
    return intersection / (_area(predicted) + _area(mask) - intersection + _EPS)


def no_target(
    mask: Bool[Array, "B H W"], box: Float[Array, "B 4"], valid: Bool[Array, "B H W"]
) -> Bool[Array, "B"]:
    """True for samples without a target in their image: an empty mask and no box.

    A box alone is a target: its mask may have shrunk to nothing on the canvas.
    """
    return ~((mask & valid).any((1, 2)) | (box != 0).any(-1))


def answer_iou(
    logits: Float[Array, "B G H W"],
    mask: Bool[Array, "B H W"],
    valid: Bool[Array, "B H W"],
    no_target: Bool[Array, "B"],
) -> Float[Array, "B G"]:
    """`mask_iou` where there is a target; elsewhere 1 for an empty mask and 0 for any other."""
    empty = ~_masks(logits, mask, valid)[0].any((-2, -1))
    return jnp.where(no_target[:, None], empty, mask_iou(logits, mask, valid))


def boundary_iou(
    logits: Float[Array, "B G H W"],
    mask: Bool[Array, "B H W"],
    valid: Bool[Array, "B H W"],
    otherwise: Float[Array, "B G"] | float = 1.0,
) -> Float[Array, "B G"]:
    """IoU of the masks' inner boundaries (arXiv 2103.16562); `otherwise` where neither has one.

    The boundary is what erosion by a square takes away; the square's side is a twentieth of the
    image's shorter side, made odd. Pixels beyond the image count as inside. So an empty mask has no
    boundary, nor has one that fills the image, nor any mask in an image of less than 40 pixels.
    """
    predicted, mask = _masks(logits, mask, valid)
    height, width = valid.any(2).sum(1), valid.any(1).sum(1)
    side = jnp.minimum(height, width) // 20
    radius = (side + (side % 2 == 0)) // 2
    predicted = predicted & _near_background(predicted, valid, radius)
    mask = mask & _near_background(mask, valid, radius)
    union = _area(predicted | mask)
    return jnp.where(union == 0, otherwise, _area(predicted & mask) / (union + _EPS))


def _masks(logits, mask, valid) -> tuple[Bool[Array, "B G H W"], Bool[Array, "B 1 H W"]]:
    return (logits > 0) & valid[:, None], (mask & valid)[:, None]


def _area(mask: Bool[Array, "*N H W"]) -> Float[Array, "*N"]:
    return mask.sum((-2, -1)).astype(jnp.float32)


def _near_background(
    mask: Bool[Array, "B G H W"], valid: Bool[Array, "B H W"], radius: Int[Array, "B"]
) -> Bool[Array, "B G H W"]:
    """True where the square of this radius around a pixel holds valid pixels outside the mask."""
    offsets = (jnp.arange(n)[:, None] - jnp.arange(n) for n in mask.shape[-2:])
    rows, columns = (jnp.abs(offset) <= radius[:, None, None] for offset in offsets)
    outside = valid[:, None] & ~mask
    # Zeros and ones: counted exactly in any precision.
    for band, product in ((rows, "byh,bghw->bgyw"), (columns, "bxw,bgyw->bgyx")):
        outside = jnp.einsum(product, band.astype(jnp.float32), outside.astype(jnp.float32)) > 0
    return outside
