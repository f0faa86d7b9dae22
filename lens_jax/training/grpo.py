"""Stage 2, GRPO: text, box and mask rewards train the whole end to end (LENS, section 3.4).

One update, one program: the packed group is scored by policy and reference, masks are drawn,
rewards and advantages computed, and policy and segmentation losses differentiated, all on device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lens_jax.config.sections import GRPOConfig
from lens_jax.distribution.gradients import Layout, Metrics, differentiate
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensModel
from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training.advantages import RULES
from lens_jax.training.losses import KL_ESTIMATES, policy_loss, segmentation_losses, token_mean
from lens_jax.training.state import TrainState, apply

Update = Callable[[TrainState, nnx.State, nnx.State, Batch, Rollout], tuple[TrainState, Metrics]]


def sums(
    model: LensModel,
    reference: LensModel | None,
    batch: Batch,
    rollout: Rollout,
    reward: UnifiedReward,
    settings: GRPOConfig,
) -> tuple[jax.Array, Metrics]:
    """The loss and the metrics, summed over completions. The loss is

    policy_weight * (policy + beta * KL - entropy_weight * entropy)
    + segmentation_weight * (BCE + dice); `GRPOConfig` explains the choices.

    Args:
        reference: the frozen policy of the KL term, scored without queries and with Qwen's own
            positions; None leaves the term out.
    """
    prompts, targets = batch.prompts, batch.targets
    tokens, lengths = rollout.tokens, rollout.lengths
    completion_mask = jnp.arange(tokens.shape[-1]) < lengths[..., None]

    score = model.score(prompts, model.embed(prompts), tokens, lengths, with_queries=True)
    hidden = score.hidden
    if settings.detach_segmentation:
        hidden = jax.lax.stop_gradient(hidden)
    masks = model.decode_masks(model.sam_features(prompts), hidden, stability=False)
    canvas = targets.mask.shape[1:]
    logits = upsample_logits(masks.logits, targets.mask_size, canvas)
    valid = valid_pixels(targets.mask_size, canvas)
    cross_entropy, dice = segmentation_losses(logits, targets.mask, valid)

    rewards = reward(tokens, lengths, jax.lax.stop_gradient(logits), targets, valid)
    advantages = jax.lax.stop_gradient(RULES[settings.advantages](rewards.total))
    kl = jnp.zeros_like(score.log_probs)
    if reference is not None:
        theirs = reference.score(
            prompts,
            reference.embed(prompts),
            tokens,
            lengths,
            with_queries=False,
            positions="mrope",
        )
        # What follows the end is arbitrary: an overflow there would reach the gradient as 0 * inf.
        reference_log_probs = jax.lax.stop_gradient(
            jnp.where(completion_mask, theirs.log_probs, score.log_probs)
        )
        kl = KL_ESTIMATES[settings.kl](score.log_probs, reference_log_probs)
    entropy = token_mean(score.entropy, completion_mask)
    policy = policy_loss(
        score.log_probs, advantages, kl, settings.beta, completion_mask, settings.surrogate
    )
    if settings.entropy_weight:
        policy -= settings.entropy_weight * entropy
    loss = jnp.sum(
        settings.policy_weight * policy + settings.segmentation_weight * (cross_entropy + dice)
    )
    gap = jnp.abs(rollout.log_probs - score.log_probs)
    per_completion = {
        "loss_policy": policy,
        "mask_bce": cross_entropy,
        "mask_dice": dice,
        "reward": rewards.total,
        "mask_iou": rewards.mask_iou,
        "box_iou": rewards.box_iou,
        "kl": token_mean(kl, completion_mask),
        "entropy": entropy,
        "completion_length": lengths,
        "rollout_gap": token_mean(gap, completion_mask),
        "truncated_fraction": ~rollout.ended,
    } | {f"reward/{name}": values for name, values in rewards.channels.items()}
    metrics = {name: values.sum().astype(jnp.float32) for name, values in per_completion.items()}
    return loss, metrics | {"loss": loss}


def make_update(
    definition: nnx.GraphDef,
    absent: nnx.State,
    optimizer: optax.GradientTransformation,
    reward: UnifiedReward,
    settings: GRPOConfig,
    micro_batches: int = 1,
    layout: Layout | None = None,
) -> Update:
    """The update as a pure function, to be jitted with its state donated.

    `(state, frozen, reference, batch, rollout) -> (state, metrics)`; metrics are means over
    completions. With `beta` 0 the reference is not computed.

    Args:
        absent: shapes of what the reference does without (`lens.split_policy`).
        micro_batches, layout: as for `gradients.differentiate`.
    """

    def loss(params, constants, rows):
        frozen, reference = constants
        if reference is not None:
            reference = nnx.merge(definition, reference, absent)
        return sums(nnx.merge(definition, params, frozen), reference, *rows, reward, settings)

    def update(state, frozen, reference, batch, rollout):
        if not (settings.beta and settings.policy_weight):
            reference = None
        constants, rows = (frozen, reference), (batch, rollout)
        gradients, metrics = differentiate(
            loss, state.params, constants, rows, micro_batches, layout
        )
        count = rollout.lengths.size
        gradients, metrics = jax.tree.map(lambda x: x / count, (gradients, metrics))
        state, norm = apply(state, gradients, metrics["loss"], optimizer)
        return state, metrics | {"grad_norm": norm, "skipped_updates": state.skipped}

    return update
