"""Drawing tokens: what may be drawn, how often, and what a draw depends on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import RepetitionPenaltyLogitsProcessor

from lens_jax.rollout.sampling import GREEDY, Sampling, penalize, row_keys, sample, top_k

torch = pytest.importorskip("torch")

V, DRAWS = 12, 20000


def brute_force(logits, sampling):
    """The distribution by definition: temperature, the k likeliest, the smallest set of mass p."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kept = order[: sampling.top_k or len(order)]
    probs = np.exp(scaled[kept] - scaled[kept].max())
    probs /= probs.sum()
    for size in itertools.count(1):
        if probs[:size].sum() >= sampling.top_p - 1e-9 or size == len(kept):
            break
    result = np.zeros(len(scaled))
    result[kept[:size]] = probs[:size] / probs[:size].sum()
    return result


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.7, top_k=4),
        Sampling(top_p=0.6),
        Sampling(temperature=0.9, top_k=5, top_p=0.9),
        Sampling(temperature=2.0, top_k=50, top_p=0.35),
    ],
    ids=str,
)
def test_distribution(sampling):
    logits = np.random.default_rng(3).normal(size=V).astype(np.float32) * 1.5
    expected = brute_force(logits, sampling)
    keys = row_keys(jax.random.key(0), jnp.arange(10), DRAWS // 10)
    many = jnp.broadcast_to(logits, (10, DRAWS // 10, V))
    drawn = jax.jit(sample, static_argnums=3)(many, keys, 0, sampling)
    counts = np.bincount(np.asarray(drawn).ravel(), minlength=V)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    kept = expected > 0
    if kept.sum() == 1:
        return
    chi2 = ((counts - DRAWS * expected)[kept] ** 2 / (DRAWS * expected)[kept]).sum()
    freedom = kept.sum() - 1  # mean of chi2; its variance is twice that
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("ties", [False, True])
def test_top_k_in_blocks(ties):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 40, 128 * 50)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    logits[0, :, 300:312] += 9.0  # all in one block
    for k in (1, 7, 20):
        ours, theirs = top_k(logits, k), jax.lax.top_k(logits, k)
        jax.tree.map(np.testing.assert_array_equal, ours, tuple(theirs))
    assert "gather" in str(jax.make_jaxpr(top_k, static_argnums=1)(logits, 20))


def test_greedy_ignores_the_rest_and_ties_go_to_the_lower_id():
    logits = np.random.default_rng(0).normal(size=(3, 2, V)).astype(np.float32)
    logits[0, 0, [4, 9]] = 50.0
    keys = row_keys(jax.random.key(0), jnp.arange(3), 2)
    for sampling in (GREEDY, Sampling(temperature=0.1, top_k=1, top_p=0.2)):
        np.testing.assert_array_equal(sample(logits, keys, 0, sampling), logits.argmax(-1))


def test_keys_are_a_function_of_sample_and_place():
    data = lambda key, ids, n: np.asarray(  # noqa: E731
        jax.random.key_data(row_keys(key, jnp.asarray(ids), n))
    )
    key = jax.random.key(1)
    few, many = data(key, [7, 3], 2), data(key, [3, 11, 7], 5)
    np.testing.assert_array_equal(few[0], many[2, :2])
    np.testing.assert_array_equal(few[1], many[0, :2])
    everything = many.reshape(-1, many.shape[-1])
    assert len(np.unique(everything, axis=0)) == len(everything)
    assert (data(jax.random.key(2), [7, 3], 2) != few).any(-1).all()


def test_tokens_of_a_completion_are_drawn_independently():
    """Another index, another draw; the same index, the same."""
    logits = jnp.zeros((4, 8, 64))
    keys = row_keys(jax.random.key(0), jnp.arange(4), 8)
    draw = jax.jit(lambda index: sample(logits, keys, index, Sampling()))
    first, second = np.asarray(draw(0)), np.asarray(draw(1))
    np.testing.assert_array_equal(first, draw(0))
    assert (first != second).mean() > 0.8


@pytest.mark.parametrize("penalty", [1.05, 2.0])
def test_repetition_penalty(penalty):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, V)).astype(np.float32)
    tokens = rng.integers(0, V, (2, 3, 5))
    seen = np.zeros((2, 3, V), bool)
    np.put_along_axis(seen, tokens, True, axis=-1)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(
        torch.tensor(tokens.reshape(6, -1)), torch.tensor(logits.reshape(6, -1))
    ).numpy()
    np.testing.assert_allclose(penalize(logits, seen, penalty), expected.reshape(2, 3, V), 1e-6)
