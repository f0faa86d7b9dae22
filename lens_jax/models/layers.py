"""Stacks of equal layers, run by scan; parameters in parts; products that widen."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

KEPT = "kept"  # the name of what `keep` marks
# What a backward pass keeps instead of computing again, by name.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def keep(x: Any) -> Any:
    """Marks what took matrix products inside a `custom_vjp`, where policies do not see them."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), x)


@struct.dataclass
class Part:
    """A device's part of a parameter that is cut over a mesh axis; gathered where it is used.

    It may lie in a stack, behind axes of layers: those come off first, so that never more than a
    layer is whole. What the gradient of the whole is summed to is the gradient of the part.
    """

    value: Array
    mesh_axis: str = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    """The one that is cut, from the end."""
    rank: int = struct.field(pytree_node=False)
    """Axes of the parameter, without those of stacks."""
    dtype: Any = struct.field(pytree_node=False)
    """Converted before the way: that of the products."""

    def whole(self) -> Array:
        value = self.value.astype(self.dtype)
        return lax.all_gather(value, self.mesh_axis, axis=value.ndim + self.axis, tiled=True)


def gather(state: Any) -> Any:
    """Parameters made whole, but not those that are still in stacks."""

    def of(x):
        return x.whole() if is_part(x) and x.value.ndim == x.rank else x

    return jax.tree.map(of, state, is_leaf=is_part)


def is_part(x: Any) -> bool:
    return isinstance(x, Part)


def _keep_all_but_gathered(primitive, *_, **__) -> bool:
    return primitive.name != "all_gather"


@jax.custom_vjp
def _widen(x, kernel):
    return x @ kernel


def _widen_backward(residuals, gradient):
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    return gradient @ kernel.T, lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_widen.defvjp(lambda x, kernel: (keep(x @ kernel), (x, kernel)), _widen_backward)


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
    """Runs `carry, out = step(layer, carry)` over layers [first, last); stacks the outs.

    Layers in parts are gathered one by one, and again in the backward pass.
    """
    definition, state = nnx.split(layers)
    parts = [x for x in jax.tree.leaves(state, is_leaf=is_part) if is_part(x)]
    in_parts = any(x.value.ndim == x.rank + 1 for x in parts)
    state = jax.tree.map(lambda x: x[first:last], state)

    def body(carry, layer_state):
        return step(nnx.merge(definition, gather(layer_state)), carry)

    if remat != "none" or in_parts:
        policy = REMAT_POLICIES[remat] or _keep_all_but_gathered
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
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
    return nnx.merge(definition, gather(jax.tree.map(pick, state)))
