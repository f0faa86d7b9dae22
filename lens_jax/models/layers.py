"""Stacks of equal layers, run by scan; products that widen."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

# What a backward pass keeps instead of computing again, by name.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def _widen(x, kernel):
    return x @ kernel


def _widen_backward(residuals, gradient):
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    return gradient @ kernel.T, lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_widen.defvjp(lambda x, kernel: (_widen(x, kernel), (x, kernel)), _widen_backward)


def widen(x: Float[Array, "... I"], kernel: Float[Array, "I O"], *_, **__) -> Float[Array, "... O"]:
    """The `dot_general` of a linear layer with far more outputs than inputs.

    One factor of the kernel's gradient has to be turned. It is the inputs here, which are small,
    where automatic differentiation takes the outputs' gradient: on CPU that is slow.
    """
    return _widen(x, kernel)


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


def periods(layers: nnx.Module, kinds: Sequence[Any]) -> tuple[nnx.Module, int]:
    """The stack as one of shorter stacks in which the `kinds` of layers repeat, and their depth.

    Scanned in turn, each kind is compiled once, however often it comes back.
    """
    depth = len(kinds)
    period = next(p for p in range(1, depth + 1) if list(kinds) == list(kinds[:p]) * (depth // p))
    definition, state = nnx.split(layers)
    state = jax.tree.map(lambda x: x.reshape(-1, period, *x.shape[1:]), state)
    return nnx.merge(definition, state), period


def stacks(modules: Iterable[nnx.Module]) -> Iterator[tuple[nnx.Module, int]]:
    """Stacks of the equal ones among neighbours, and how many each holds."""
    parts = (nnx.split(module) for module in modules)
    for definition, run in itertools.groupby(parts, lambda part: part[0]):
        states = [state for _, state in run]
        yield nnx.merge(definition, jax.tree.map(lambda *x: jnp.stack(x), *states)), len(states)


def layer(layers: nnx.Module, index) -> nnx.Module:
    """One layer of a stack; `index` may be traced."""
    definition, state = nnx.split(layers)
    pick = lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
    return nnx.merge(definition, jax.tree.map(pick, state))
