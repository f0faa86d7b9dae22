"""Layers that several parts of SAM 1 and SAM 2 share."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models.layers import linear


class Mlp(nnx.Module):
    """Linear layers with an activation between them."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        **options: Any,
    ):
        self.activation = activation
        self.layers = nnx.List(linear(*pair, **options) for pair in itertools.pairwise(sizes))

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Upscale2x(nnx.Module):
    """Transposed convolution with a 2x2 kernel and stride 2: every cell becomes 2x2 cells."""

    def __init__(self, dim_in: int, dim_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.dtype = dtype
        init = nnx.initializers.lecun_normal(in_axis=-2, out_axis=(0, 1, 3))
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, dim_in, dim_out)))
        self.bias = nnx.Param(jnp.zeros(dim_out))

    def __call__(self, x: Float[Array, "*batch H W I"]) -> Float[Array, "*batch 2*H 2*W O"]:
        *batch, height, width, _ = x.shape
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...].astype(self.dtype)
        x = jnp.einsum("...hwi,abio->...hawbo", x.astype(self.dtype), kernel) + bias
        return x.reshape(*batch, 2 * height, 2 * width, -1)
