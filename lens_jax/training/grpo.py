"""Stage 2, GRPO: text, box and mask rewards train the whole end to end (LENS, section 3.4).

One update, one program: the packed group is scored by policy and reference, masks are drawn,
rewards and advantages computed, and policy and segmentation losses differentiated, all on device.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensModel
from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training.advantages import RULES
from lens_jax.training.losses import KL_ESTIMATES, policy_loss, segmentation_losses, token_mean
from lens_jax.training.state import Differentiate, Metrics, TrainState, apply, differentiate

Update = Callable[[TrainState, nnx.State, nnx.State, Batch, Rollout], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """policy_weight * (policy + beta * KL - entropy_weight * entropy)
    + segmentation_weight * (BCE + dice); `config.GRPOConfig` explains the choices."""

    beta: float = 0.04
    kl: str = "k3"
    advantages: str = "group_normalized"
    surrogate: str = "ratio"
    entropy_weight: float = 0.0
    policy_weight: float = 1.0
    segmentation_weight: float = 1.0
    detach_segmentation: bool = False


def sums(
    model: LensModel,
    reference: LensModel | None,
    batch: Batch,
    rollout: Rollout,
    reward: UnifiedReward,
    objective: Objective,
) -> tuple[jax.Array, Metrics]:
    """The loss and the metrics, summed over completions.

    Args:
        reference: the frozen policy of the KL term, scored without queries and with Qwen's own
            positions; None leaves the term out.
    """
    prompts, targets = batch.prompts, batch.targets
    tokens, lengths = rollout.tokens, rollout.lengths
    counted = jnp.arange(tokens.shape[-1]) < lengths[..., None]

    score = model.score(prompts, model.embed(prompts), tokens, lengths, with_queries=True)
    hidden = score.hidden
    if objective.detach_segmentation:
        hidden = jax.lax.stop_gradient(hidden)
    masks = model.decode_masks(model.sam_features(prompts), hidden, stability=False)
    canvas = targets.mask.shape[1:]
    logits = upsample_logits(masks.logits, targets.mask_size, canvas)
    valid = valid_pixels(targets.mask_size, canvas)
    cross_entropy, dice = segmentation_losses(logits, targets.mask, valid)

    rewards = reward(tokens, lengths, jax.lax.stop_gradient(logits), targets, valid)
    advantages = jax.lax.stop_gradient(RULES[objective.advantages](rewards.total))
    kl = jnp.zeros_like(score.log_probs)
    if reference is not None:
        past = reference.score(
            prompts,
            reference.embed(prompts),
            tokens,
            lengths,
            with_queries=False,
            positions="mrope",
        )
        # What follows the end is arbitrary: an overflow there would reach the gradient as 0 * inf.
        past = jnp.where(counted, past.log_probs, score.log_probs)
        kl = KL_ESTIMATES[objective.kl](score.log_probs, jax.lax.stop_gradient(past))
    entropy = token_mean(score.entropy, counted)
    policy = policy_loss(
        score.log_probs, advantages, kl, objective.beta, counted, objective.surrogate
    )
    if objective.entropy_weight:
        policy -= objective.entropy_weight * entropy
    loss = jnp.sum(
        objective.policy_weight * policy + objective.segmentation_weight * (cross_entropy + dice)
    )
    gap = jnp.abs(rollout.log_probs - score.log_probs)
    per_completion = {
        "loss_policy": policy,
        "mask_bce": cross_entropy,
        "mask_dice": dice,
        "reward": rewards.total,
        "mask_iou": rewards.mask_iou,
        "box_iou": rewards.box_iou,
        "kl": token_mean(kl, counted),
        "entropy": entropy,
        "completion_length": lengths,
        "rollout_gap": token_mean(gap, counted),
        "truncated_fraction": ~rollout.ended,
    } | {f"reward/{name}": values for name, values in rewards.channels.items()}
    metrics = {name: values.sum().astype(jnp.float32) for name, values in per_completion.items()}
    return loss, metrics | {"loss": loss}


def make_update(
    definition: nnx.GraphDef,
    absent: nnx.State,
    optimizer: optax.GradientTransformation,
    reward: UnifiedReward,
    objective: Objective,
    portions: int = 1,
    differentiate: Differentiate = differentiate,
) -> Update:
    """The update as a pure function, to be jitted with its state donated.

    `(state, frozen, reference, batch, rollout) -> (state, metrics)`; metrics are means over
    completions. With `beta` 0 the reference is not computed.

    Args:
        absent: shapes of what the reference does without (`lens.split_policy`).
        differentiate: `parallel.Devices.differentiate` on a mesh.
    """

    def sums_of(params, constants, data):
        frozen, reference = constants
        past = None if reference is None else nnx.merge(definition, reference, absent)
        return sums(nnx.merge(definition, params, frozen), past, *data, reward, objective)

    def update(state, frozen, reference, batch, rollout):
        if not (objective.beta and objective.policy_weight):
            reference = None
        gradients, metrics = differentiate(
            sums_of, state.params, (frozen, reference), (batch, rollout), portions
        )
        count = rollout.lengths.size
        gradients, metrics = jax.tree.map(lambda x: x / count, (gradients, metrics))
        state, norm = apply(state, gradients, metrics["loss"], optimizer)
        return state, metrics | {"grad_norm": norm, "skipped_updates": state.skipped}

    return update
