"""Shapes of what a run's programs take, with their shardings; nothing is computed."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lens_jax.models.inputs import Batch, Prompts, Targets
from lens_jax.models.lens import LensConfig


def array(
    shape: Sequence[int], dtype: Any, sharding: NamedSharding | None = None
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings; one for all, or one for each."""
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: array(x.shape, x.dtype, shardings), tree)
    return jax.tree.map(lambda x, sharding: array(x.shape, x.dtype, sharding), tree, shardings)


def batch(
    model: LensConfig,
    rows: int,
    *,
    slots: tuple[int, int],
    prompt: int,
    answer: int,
    canvas: tuple[int, int],
    sharding: NamedSharding | None = None,
) -> Batch:
    """A batch of `rows` prompts.

    Args:
        slots: W windows of S patches each.
        prompt: P, tokens of a prompt.
        answer: tokens of a teacher-forced answer.
        canvas: H and W of the true masks.
    """

    def of(*sizes: int, dtype=jnp.int32):
        return array((rows, *sizes), dtype, sharding)

    side = model.sam.image_size
    prompts = Prompts(
        patches=of(*slots, model.mllm.vision.patch_dim, dtype=jnp.float32),
        patch_positions=of(*slots, 2),
        patch_mask=of(*slots, dtype=jnp.bool_),
        tokens=of(prompt),
        image_index=of(prompt),
        length=of(),
        positions=of(3, prompt),
        next_position=of(),
        sam_pixels=of(side, side, 3, dtype=jnp.uint8),
    )
    targets = Targets(
        box=of(4, dtype=jnp.float32),
        mask=of(*canvas, dtype=jnp.bool_),
        mask_size=of(2),
        answer=of(answer),
        answer_length=of(),
    )
    return Batch(prompts, targets, sample_id=of())


def bytes_per_chip(tree: Any) -> int:
    """Bytes per chip of arrays with these shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
