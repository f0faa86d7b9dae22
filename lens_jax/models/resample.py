"""Low-resolution mask logits on the canvas of the target masks.

Images differ in size, programs do not: a mask of its own size (height, width) lies in the upper
left corner of a canvas [H, W], and each sample is interpolated by its own two matrices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def upsample_logits(
    logits: Float[Array, "B *G h w"], size: Int[Array, "B 2"], canvas: tuple[int, int]
) -> Float[Array, "B *G H W"]:
    """Bilinear interpolation to each sample's own (height, width), without aligned corners.

    Pixels beyond that size repeat the last ones; `valid_pixels` leaves them out.
    """
    height, width = logits.shape[-2:]
    rows = _interpolation(size[:, 0], height, canvas[0])
    columns = _interpolation(size[:, 1], width, canvas[1])
    logits = logits.astype(jnp.float32)
    # In float32 throughout: a mask is where its logits are above 0.
    exact = {"precision": jax.lax.Precision.HIGHEST}
    logits = jnp.einsum("byh,b...hw->b...yw", rows, logits, **exact)
    return jnp.einsum("bxw,b...yw->b...yx", columns, logits, **exact)


def valid_pixels(size: Int[Array, "B 2"], canvas: tuple[int, int]) -> Bool[Array, "B H W"]:
    """The mask of the canvas that is True on pixels of the image."""
    rows = jnp.arange(canvas[0]) < size[:, 0, None]
    columns = jnp.arange(canvas[1]) < size[:, 1, None]
    return rows[:, :, None] & columns[:, None, :]


def _interpolation(
    size: Int[Array, "B"], source: int, target: int
) -> Float[Array, "B target source"]:
    """Row i holds the weights of the source pixels in pixel i of an image of the given size."""
    centre = (jnp.arange(target) + 0.5) * (source / size[:, None].astype(jnp.float32)) - 0.5
    centre = jnp.clip(centre, 0, source - 1)
    return jnp.maximum(0, 1 - jnp.abs(centre[:, :, None] - jnp.arange(source)))
