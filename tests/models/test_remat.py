"""Recomputing layers in the backward pass changes memory, not gradients."""

import jax
import numpy as np
import pytest
from flax import nnx

from lens_jax.models.lens import abstract, split_policy
from tests import micro

B, G, T = 1, 2, 3


def gradient_function(remat):
    """Of a weighted sum of everything that vision tower and language model put out."""
    model = abstract(micro.CONFIG, remat=remat)
    definition, _, rest = split_policy(model)
    prompts = micro.collate(micro.CONFIG, [micro.row(micro.CONFIG, (4, 6), (2, 3), seed=0)])
    tokens = np.array([[[3, 1, 4], [1, 5, 9]]], np.int32)
    lengths = np.array([[3, 2]], np.int32)
    weights = np.random.default_rng(0).standard_normal((B, G, T)).astype(np.float32)

    def loss(policy):
        model = nnx.merge(definition, policy, rest)
        score = model.score(prompts, model.embed(prompts), tokens, lengths, with_queries=False)
        return (weights * score.log_probs).sum() + score.entropy.sum()

    return jax.grad(loss)


@pytest.fixture(scope="module")
def policy():
    return split_policy(micro.model())[1]


@pytest.fixture(scope="module")
def expected(policy):
    return jax.jit(gradient_function("none"))(policy)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients(policy, expected, remat):
    function = gradient_function(remat)
    micro.same_gradients(jax.jit(function)(policy), expected)
    text = str(jax.make_jaxpr(function)(policy))
    assert "checkpoint" in text or "remat" in text


def test_none_computes_nothing_again(policy):
    text = str(jax.make_jaxpr(gradient_function("none"))(policy))
    assert "checkpoint" not in text and "remat" not in text
