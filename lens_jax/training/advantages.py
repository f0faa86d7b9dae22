"""From rewards to advantages: a completion against its group. A run names one of `RULES`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_EPS = 1e-4


def group_normalized(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """(r - mean) / (std + 1e-4), unbiased std (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""
    return centered(rewards) / (_std(rewards) + _EPS)


def no_mean_for_same_reward(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """As `group_normalized`, clamped to [-1, 1]; a group of equal rewards keeps their sign.

    So a prompt that all completions solve is still learnt from.
    """
    # Not std == 0: the mean of equal numbers may differ from them in the last place.
    differ = rewards.max(1, keepdims=True) != rewards.min(1, keepdims=True)
    return jnp.clip(jnp.where(differ, centered(rewards), rewards) / (_std(rewards) + _EPS), -1, 1)


def centered(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """r - mean (Kimi k1.5, arXiv 2501.12599, section 2.3.2)."""
    return rewards - rewards.mean(axis=1, keepdims=True)


def _std(rewards: Float[Array, "B G"]) -> Float[Array, "B 1"]:
    return rewards.std(axis=1, ddof=1, keepdims=True)


RULES = {rule.__name__: rule for rule in (group_normalized, no_mean_for_same_reward, centered)}
