"""A packed group against G full sequences: equal losses and gradients, and no logits kept."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.official import OfficialLayout
from lens_jax.config import GRPOConfig
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import split_policy
from lens_jax.models.parameters import select
from lens_jax.rewards.unified import Rewards
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import grpo
from lens_jax.training.advantages import RULES
from tests import micro

B, T = 2, 7
# More logits than anything else has elements.
VOCABULARY = 1024
LENGTHS = [0, 5, T, 1, 3, 6, 2, 4]


def program(config, group, with_reference, layout):
    """Loss, metrics and gradients, compiled, with their arguments; rewards are given."""
    model = micro.model(config)
    definition, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    _, policy, rest = split_policy(model)
    rng = np.random.default_rng(group)
    reference = jax.tree.map(lambda x: 1.03 * x, policy) if with_reference else None
    rows = [micro.row(config, (4, 6), (3, 4), seed=0), micro.row(config, (6, 4), (1, 2), seed=1)]
    prompts = micro.collate(config, rows, more_tokens=2, more_windows=1)
    batch = Batch(prompts, micro.targets(B), np.arange(B, dtype=np.int32))
    lengths = np.stack([LENGTHS[:group], LENGTHS[-group:]]).astype(np.int32)
    shape = (*lengths.shape, T)
    rollout = Rollout(
        rng.integers(0, 58, shape).astype(np.int32),
        lengths,
        -rng.random(shape, np.float32),
        np.ones(lengths.shape, bool),
    )
    earned = rng.standard_normal(lengths.shape).astype(np.float32)

    def reward(*_):
        given = jnp.asarray(earned)
        return Rewards(given[..., None], given, given, given, ("box",))

    @jax.jit
    def run(trained, frozen, reference, rest, batch, rollout):
        past = layout(nnx.merge(definition, reference, rest)) if with_reference else None

        def loss(params):
            model = layout(nnx.merge(definition, params, frozen))
            return grpo.sums(model, past, batch, rollout, reward, GRPOConfig(beta=0.3))

        (total, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        return total, metrics, gradients

    arguments = trained, frozen, reference, rest, batch, rollout
    # Compiled quickly rather than well: most of this file's time goes there.
    options = {"xla_backend_optimization_level": 0}
    return run.lower(*arguments).compile(options), arguments


def largest_buffer(compiled) -> int:
    """Elements of the largest array in an optimised program."""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


CASES = [  # group, positions, reference
    (1, "mrope", False),
    (3, "text", True),
    (8, "mrope", True),
]


@pytest.mark.parametrize(("group", "positions", "reference"), CASES)
def test_losses_and_gradients(monkeypatch, group, positions, reference):
    # A group of one has no spread to be normalised by: the rewards are the advantages.
    monkeypatch.setitem(RULES, "group_normalized", lambda rewards: rewards)
    mllm = dataclasses.replace(micro.CONFIG.mllm, vocab_size=VOCABULARY)
    config = dataclasses.replace(micro.CONFIG, mllm=mllm, context_positions=positions)
    ours, arguments = program(config, group, reference, lambda model: model)
    theirs, _ = program(config, group, reference, lambda model: OfficialLayout(model, group))

    loss, metrics, gradients = ours(*arguments)
    expected_loss, expected, expected_gradients = theirs(*arguments)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (metrics["kl"] > 0) == reference
    micro.same_gradients(gradients, expected_gradients)

    # Nowhere a logit for every token of every completion, let alone of every sequence.
    logits = B * group * T * VOCABULARY
    if logits > VOCABULARY * config.mllm.hidden_size * 2:
        assert largest_buffer(ours) < logits
    length = arguments[4].prompts.tokens.shape[1] + T + config.num_queries
    assert largest_buffer(theirs) >= B * group * length * VOCABULARY
