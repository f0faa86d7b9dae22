"""Losses, per sample and in float32; the steps divide once, after accumulation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def policy_loss(
    log_probs: Float[Array, "B G T"],
    advantages: Float[Array, "B G"],
    kl: Float[Array, "B G T"],
    beta: float,
    completion_mask: Bool[Array, "B G T"],
    surrogate: str = "ratio",
) -> Float[Array, "B G"]:
    """On-policy: -S A + beta KL, mean over a completion's tokens.

    S is one of `SURROGATES`: `ratio`, exp(logp - sg(logp)), is GRPO's (there is one update a
    rollout, so it is 1 and only its gradient matters); `probability` is exp(logp).
    """
    surrogates = SURROGATES[surrogate](log_probs)
    return token_mean(-surrogates * advantages[..., None] + beta * kl, completion_mask)


SURROGATES = {"ratio": lambda x: jnp.exp(x - jax.lax.stop_gradient(x)), "probability": jnp.exp}


def k1(log_probs: Float[Array, "B G T"], reference: Float[Array, "B G T"]) -> Float[Array, "B G T"]:
    """-d, where d = reference - policy: unbiased; its on-policy gradient is 0 in expectation."""
    return log_probs - reference


def k3(log_probs: Float[Array, "B G T"], reference: Float[Array, "B G T"]) -> Float[Array, "B G T"]:
    """exp(d) - d - 1, d = reference - policy: unbiased and never negative."""
    difference = reference - log_probs
    return jnp.exp(difference) - difference - 1.0


def kimi(
    log_probs: Float[Array, "B G T"], reference: Float[Array, "B G T"]
) -> Float[Array, "B G T"]:
    """d^2 / 2 (Kimi k1.5, arXiv 2501.12599)."""
    return (reference - log_probs) ** 2 / 2


# Schulman, "Approximating KL Divergence" (2020): estimates of KL(policy || reference), by token.
KL_ESTIMATES = {"k1": k1, "k3": k3, "kimi": kimi}


def token_mean(
    values: Float[Array, "B G T"], completion_mask: Bool[Array, "B G T"]
) -> Float[Array, "B G"]:
    """Mean over the tokens of each completion; 0 for an empty one."""
    total = jnp.sum(jnp.where(completion_mask, values, 0.0), axis=-1)
    return total / jnp.maximum(completion_mask.sum(-1), 1)


def segmentation_losses(
    logits: Float[Array, "B G H W"], mask: Bool[Array, "B H W"], valid: Bool[Array, "B H W"]
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """Binary cross-entropy (mean over valid pixels) and dice loss of each mask."""
    mask, valid = mask[:, None], valid[:, None]
    cross_entropy = jax.nn.softplus(jnp.where(mask, -logits, logits))
    pixels = valid.sum((-2, -1))
    cross_entropy = jnp.sum(jnp.where(valid, cross_entropy, 0.0), (-2, -1)) / pixels
    probs = jnp.where(valid, jax.nn.sigmoid(logits), 0.0)
    target = (mask & valid).astype(jnp.float32)
    overlap = jnp.sum(probs * target, (-2, -1))
    dice = 1 - (2 * overlap + 1) / (probs.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return cross_entropy, dice
