"""What an update changes, and the optimizer that changes it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Int

Metrics = dict[str, Array]
Sums = Callable[[nnx.State, Any, Any], tuple[Array, Metrics]]
"""`(params, constants, batch)`: the loss and the metrics, summed over rows of the batch."""
Differentiate = Callable[[Sums, nnx.State, Any, Any, int], tuple[nnx.State, Metrics]]


@struct.dataclass
class TrainState:
    """Trained parameters with their moments. Frozen parameters have neither and live elsewhere.

    `skipped` counts updates that a non-finite loss or gradient made us leave out.
    """

    step: Int[Array, ""]
    params: nnx.State
    moments: optax.OptState
    skipped: Int[Array, ""]


def create(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state; each array is copied, as updates donate their state."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def make_schedule(kind: str, peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then `constant`, or `linear` or `cosine` down to 0 at `steps`."""
    rest = max(1, steps - warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[kind]()
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW after clipping to a global norm."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay),
    )


def apply(
    state: TrainState,
    gradients: nnx.State,
    loss: Array,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Array]:
    """One step of the optimizer, left out on device if loss or gradients are not finite.

    Returns the new state and the gradients' norm before clipping.
    """
    norm = optax.global_norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    changes, moments = optimizer.update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, changes)
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, moments),
        (state.params, state.moments),
    )
    skipped = state.skipped + ~finite
    return TrainState(state.step + 1, params, moments, skipped), norm


def accumulate(
    gradient_of_sums: Callable[[Any], tuple[Any, Metrics]], batch: Any, portions: int
) -> tuple[Any, Metrics]:
    """Sums `gradient_of_sums(portion)` over equal portions of a batch, one after another.

    Sums, not means: cutting a batch changes nothing but rounding. Rows are dealt out in turn, so
    that a batch sharded over devices stays where it is.
    """
    if portions == 1:
        return gradient_of_sums(batch)
    deal = lambda x: x.reshape(-1, portions, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    batch = jax.tree.map(deal, batch)
    shapes = jax.eval_shape(gradient_of_sums, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, portion):
        # XLA would else move sums over devices behind the loop, and carry whole gradients there.
        sums = jax.tree.map(jax.lax.optimization_barrier, gradient_of_sums(portion))
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(add, zeros, batch)[0]


def differentiate(
    sums: Sums, params: nnx.State, constants: Any, batch: Any, portions: int
) -> tuple[nnx.State, Metrics]:
    """Gradients and metrics of `sums(params, constants, batch)`, in portions of the batch."""

    def gradient_of_sums(portion):
        return jax.grad(sums, has_aux=True)(params, constants, portion)

    return accumulate(gradient_of_sums, batch, portions)
