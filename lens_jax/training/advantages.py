"""From rewards to advantages (DeepSeekMath, section 4.1.1): a completion against its group."""

from jaxtyping import Array, Float


def group_normalized(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """(r - mean) / (std + 1e-4) over the group, with the unbiased standard deviation."""
    mean = rewards.mean(axis=1, keepdims=True)
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    return (rewards - mean) / (std + 1e-4)
