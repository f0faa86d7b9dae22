"""Stacks of equal layers, run by scan."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

# What a backward pass keeps instead of computing again, by name.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """A module whose parameters carry a leading axis of `depth` layers."""
    return nnx.vmap(make)(rngs.split(depth))


def scan(
    layers: nnx.Module,
    step: Callable[[nnx.Module, Any], tuple[Any, Any]],
    carry: Any,
    *,
    remat: str = "none",
    first: int = 0,
    last: int | None = None,
) -> tuple[Any, Any]:
    """Runs `carry, out = step(layer, carry)` over layers [first, last); stacks the outs."""
    definition, state = nnx.split(layers)
    state = jax.tree.map(lambda x: x[first:last], state)

    def body(carry, layer_state):
        return step(nnx.merge(definition, layer_state), carry)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return lax.scan(body, carry, state)


def layer(layers: nnx.Module, index) -> nnx.Module:
    """One layer of a stack; `index` may be traced."""
    definition, state = nnx.split(layers)
    pick = lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
    return nnx.merge(definition, jax.tree.map(pick, state))
