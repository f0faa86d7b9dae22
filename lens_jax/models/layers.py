"""Layers of every part of the model, and stacks of equal layers that run by scan."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lens_jax.distribution.sharded import gather, has_sharded_layers

Module = TypeVar("Module", bound=nnx.Module)

SAVED = "saved"  # the name of what `save` marks
# What a backward pass saves instead of computing again, by name.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def save(x: Any) -> Any:
    """Names the results of products inside a `custom_vjp`, where policies do not see them."""
    return jax.tree.map(lambda x: checkpoint_name(x, SAVED), x)


def linear(inputs: int, outputs: int, *, wide: bool = False, **options: Any) -> nnx.Linear:
    """A linear layer. Every projection of the model is made here; options are those of nnx.Linear.

    Args:
        wide: there are far more outputs than inputs, which changes how the gradient is computed.
    """
    if wide:
        options["dot_general"] = wide_product
    return nnx.Linear(inputs, outputs, **options)


def layer_norm(width: int, epsilon: float = 1e-6, **options: Any) -> nnx.LayerNorm:
    """LayerNorm over the last axis with the two-pass variance, as PyTorch computes it."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, **options)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The exact GELU, by the error function."""
    return jax.nn.gelu(x, approximate=False)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


@jax.custom_vjp
def _wide_product(x, kernel):
    return x @ kernel


def _wide_product_backward(residuals, gradient):
    x, kernel = residuals
    rows = tuple(range(x.ndim - 1))
    return gradient @ kernel.T, lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_wide_product.defvjp(lambda x, kernel: (save(x @ kernel), (x, kernel)), _wide_product_backward)


def wide_product(
    x: Float[Array, "... I"], kernel: Float[Array, "I O"], *_, **__
) -> Float[Array, "... O"]:
    """The `dot_general` of a linear layer with far more outputs than inputs.

    One factor of the kernel's gradient has to be transposed. Here it is the inputs, which are
    small. Automatic differentiation transposes the outputs' gradient, which is slow on CPU.
    """
    return _wide_product(x, kernel)


class _OneKey(nnx.RngStream):
    """The same key again and again, where the values drawn from it do not matter."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def shapes_of(make: Callable[[nnx.Rngs], Module]) -> Module:
    """The module that `make` returns, with shapes in place of arrays: no memory is taken.

    A stream of keys counts what it gives out, and JAX looks through all that has been traced at
    each count. For LENS-3B that took eleven seconds of thirteen; one key needs no count.
    """

    def with_one_key() -> Module:
        rngs = nnx.Rngs()
        rngs.default = _OneKey(0, tag="default")
        return make(rngs)

    return nnx.eval_shape(with_one_key)


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

    Sharded layers are gathered one by one, and again in the backward pass.
    """
    definition, state = nnx.split(layers)
    is_sharded = has_sharded_layers(state)
    state = jax.tree.map(lambda x: x[first:last], state)

    def body(carry, layer_state):
        return step(nnx.merge(definition, gather(layer_state)), carry)

    if remat != "none" or is_sharded:
        policy = REMAT_POLICIES[remat] or _save_all_but_gathered
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return lax.scan(body, carry, state)


def _save_all_but_gathered(primitive, *_, **__) -> bool:
    return primitive.name != "all_gather"


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
    split = (nnx.split(module) for module in modules)
    for definition, run in itertools.groupby(split, lambda pair: pair[0]):
        states = [state for _, state in run]
        yield nnx.merge(definition, jax.tree.map(lambda *x: jnp.stack(x), *states)), len(states)


def layer(layers: nnx.Module, index) -> nnx.Module:
    """One layer of a stack; `index` may be traced."""
    definition, state = nnx.split(layers)
    pick = lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False)  # noqa: E731
    return nnx.merge(definition, gather(jax.tree.map(pick, state)))
