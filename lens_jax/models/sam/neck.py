"""The feature pyramid on top of the trunk (Lin et al., "Feature Pyramid Networks", 2017)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models.sam.config import Sam2Config


class FpnNeck(nnx.Module):
    """Projects every stage to `d_model` and lets coarse levels flow into the next finer ones.

    `convs` (1x1, so linear) run from the coarsest level to the finest, as in the original.
    """

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.top_down, self.scalp = config.fpn_top_down_levels, config.scalp
        self.convs = nnx.List(
            nnx.Linear(dim, config.d_model, dtype=dtype, rngs=rngs)
            for dim in config.stage_dims[::-1]
        )

    def __call__(self, stages: list[Float[Array, "B h w I"]]) -> list[Float[Array, "B h w C"]]:
        """Feature levels, finest first, without the `scalp` coarsest ones."""
        coarsest = len(stages) - 1
        levels, previous = [], None
        for level in range(coarsest, -1, -1):
            x = self.convs[coarsest - level](stages[level])
            if level in self.top_down and previous is not None:
                x = x + previous.repeat(2, axis=1).repeat(2, axis=2)
            levels.insert(0, x)
            previous = x
        return levels[: len(levels) - self.scalp]
