"""Losses and advantages against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models.resample import valid_pixels
from lens_jax.training.advantages import RULES, group_normalized
from lens_jax.training.losses import (
    KL_ESTIMATES,
    k3,
    policy_loss,
    segmentation_losses,
    token_mean,
)

B, G, T = 2, 3, 5
LENGTHS = np.array([[5, 1, 0], [2, 4, 3]])
COUNTED = np.arange(T) < LENGTHS[..., None]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "expected", "slope"),
    [  # of d = reference - policy; the slope with respect to the policy
        ("k1", lambda d: -d, lambda d: np.ones_like(d)),
        ("k3", lambda d: np.exp(d) - d - 1, lambda d: 1 - np.exp(d)),
        ("kimi", lambda d: d**2 / 2, lambda d: -d),
    ],
)
def test_kl_estimates(name, expected, slope):
    policy, reference = normal(0, B, G, T), normal(1, B, G, T)
    estimate = KL_ESTIMATES[name]
    d = reference.astype(np.float64) - policy
    np.testing.assert_allclose(estimate(policy, reference), expected(d), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(estimate(policy, policy), 0)
    gradient = jax.grad(lambda x: estimate(x, reference).sum())(jnp.asarray(policy))
    np.testing.assert_allclose(gradient, slope(d), rtol=1e-5, atol=1e-6)


def test_policy_loss_of_probabilities_and_its_gradient():
    """-exp(log-prob) A: likely tokens move more."""
    log_probs, advantages = -np.abs(normal(0, B, G, T)), normal(2, B, G)

    def loss(log_probs):
        zero = jnp.zeros_like(log_probs)
        return policy_loss(log_probs, advantages, zero, 0.0, COUNTED, "probability").sum()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_probs))
    per_token = -np.exp(log_probs.astype(np.float64)) * advantages[..., None]
    per_token = np.where(COUNTED, per_token / np.maximum(LENGTHS, 1)[..., None], 0)
    np.testing.assert_allclose(value, per_token.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, per_token, rtol=1e-5, atol=1e-6)


def test_policy_loss_and_its_gradient():
    log_probs, reference, advantages = normal(0, B, G, T), normal(1, B, G, T), normal(2, B, G)
    beta = 0.3

    def loss(log_probs):
        per = policy_loss(log_probs, advantages, k3(log_probs, reference), beta, COUNTED)
        return per.sum(), per

    gradient, ours = jax.grad(loss, has_aux=True)(jnp.asarray(log_probs))
    d = reference.astype(np.float64) - log_probs
    expected, slope = np.zeros((B, G)), np.zeros((B, G, T))
    for i, j in np.ndindex(B, G):
        n = LENGTHS[i, j]
        for t in range(n):  # the ratio is 1; d(ratio) / d(log-prob) = 1, d(k3) = 1 - exp(d)
            expected[i, j] += (-advantages[i, j] + beta * (np.exp(d) - d - 1)[i, j, t]) / n
            slope[i, j, t] = (-advantages[i, j] + beta * (1 - np.exp(d[i, j, t]))) / n
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


def test_token_mean():
    values = normal(3, B, G, T)
    expected = [
        [v[:n].mean() if n else 0.0 for v, n in zip(*x, strict=True)]
        for x in zip(values, LENGTHS, strict=True)
    ]
    np.testing.assert_allclose(token_mean(values, COUNTED), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_segmentation_losses(scale):
    """Ragged true sizes on one canvas, logits that saturate too, an empty mask."""
    canvas, sizes = (7, 9), np.array([[7, 9], [3, 4], [5, 2]])
    rng = np.random.default_rng(0)
    logits = scale * normal(4, 3, G, *canvas)
    mask = rng.random((3, *canvas)) < 0.4
    mask[2] = False

    def loss(logits):
        both = segmentation_losses(logits, mask, valid_pixels(sizes, canvas))
        return sum(x.sum() for x in both), both

    gradient, (cross_entropy, dice) = jax.grad(loss, has_aux=True)(jnp.asarray(logits))
    for i, (h, w) in enumerate(sizes):
        for g in range(G):
            z, t = logits[i, g, :h, :w].astype(np.float64), mask[i, :h, :w].astype(np.float64)
            with np.errstate(over="ignore"):
                p = 1 / (1 + np.exp(-z))
            expected = (np.logaddexp(0, z) - t * z).mean()
            np.testing.assert_allclose(cross_entropy[i, g], expected, rtol=1e-5)
            expected = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
            np.testing.assert_allclose(dice[i, g], expected, rtol=1e-5, atol=1e-6)
            s, u = (p * t).sum(), p.sum() + t.sum() + 1
            slope = (p - t) / (h * w) - (2 * t * u - (2 * s + 1)) / u**2 * p * (1 - p)
            np.testing.assert_allclose(gradient[i, g, :h, :w], slope, rtol=1e-4, atol=1e-6)
        outside = np.ones(canvas, bool)
        outside[:h, :w] = False
        assert (np.asarray(gradient)[i][:, outside] == 0).all()


def test_group_normalized():
    rewards = np.array([[0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5], [3, 1, 2, 0]], np.float32)
    r = rewards.astype(np.float64)
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group_normalized(rewards), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(group_normalized(rewards)[1], 0)


def test_centered():
    rewards = np.array([[0.1, 0.9, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5]], np.float32)
    ours = RULES["centered"](rewards)
    np.testing.assert_allclose(ours, rewards - rewards.mean(1, keepdims=True), atol=1e-6)


def test_no_mean_for_same_reward():
    """Equal rewards keep their sign, clamped; 0.7 three times has a mean that rounds."""
    rewards = np.array([[0.1, 0.9, 0.4], [0.7, 0.7, 0.7], [0, 0, 0], [0, 0, 5]], np.float32)
    ours = RULES["no_mean_for_same_reward"](rewards)
    r = rewards.astype(np.float64)
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    expected[1] = 1
    np.testing.assert_allclose(ours, np.clip(expected, -1, 1), rtol=1e-5, atol=1e-6)
    assert ours[1].tolist() == [1, 1, 1] and ours[3, 2] == 1
