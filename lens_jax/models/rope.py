"""Rotary positions: multimodal (M-RoPE) for the language model, two-dimensional for vision."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "... L H/2"], Float[Array, "... L H/2"]]  # cosine, sine; float32


def multimodal_rotation(
    positions: Int[Array, "... 3 L"], head_dim: int, theta: float, sections: tuple[int, ...]
) -> Rotation:
    """M-RoPE (Qwen2-VL, section 2.1): each section of the frequencies turns with its own axis.

    `sections` gives the numbers of frequencies that follow the temporal, row and column position.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    axis = np.repeat(np.arange(len(sections)), sections)
    angles = jnp.moveaxis(positions[..., axis, :], -2, -1).astype(jnp.float32) * frequency
    return jnp.cos(angles), jnp.sin(angles)


def grid_rotation(
    positions: Int[Array, "... L 2"], head_dim: int, theta: float = 10000.0
) -> Rotation:
    """Half of the frequencies turn with the row, half with the column."""
    half = head_dim // 2
    frequency = theta ** (-np.arange(0, half, 2, dtype=np.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequency
    angles = angles.reshape(*angles.shape[:-2], half)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "... L N H"], rotation: Rotation) -> Float[Array, "... L N H"]:
    """Turns the pairs (x[i], x[i + H/2]) by their angles, in float32."""
    cosine, sine = (r[..., None, :] for r in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
