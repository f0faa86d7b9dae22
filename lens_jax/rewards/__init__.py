"""Rewards on the device: sentence, box and mask, unified (LENS, section 3.3)."""

from lens_jax.rewards.sentence import text_rewards
