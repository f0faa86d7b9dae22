"""The state of training, and the optimizer that changes it."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array, Int

from lens_jax.config.sections import StageConfig


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


def make_schedule(settings: StageConfig) -> optax.Schedule:
    """Linear warm-up from 0, then `constant`, or `linear` or `cosine` to 0 at the last step."""
    peak, warmup_steps = settings.learning_rate, settings.warmup_steps
    rest = max(1, settings.steps - warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]()
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def make_optimizer(settings: StageConfig) -> optax.GradientTransformation:
    """AdamW, with the stage's schedule, after clipping to a global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            make_schedule(settings),
            b1=settings.b1,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
        ),
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
