"""The programs of a run, as the loop and launch/compile.py build them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens_jax import config as configs
from lens_jax.distribution import sharding
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import programs
from tests import micro


def read_text(tokens, lengths):
    zeros = jnp.zeros(len(tokens), bool)
    names = ("think_format", "grounding_format", "grounding_format_reasoning", "box_found")
    return dict.fromkeys(names, zeros) | {"box": jnp.zeros((len(tokens), 4))}


@pytest.fixture(scope="module")
def stage() -> programs.Reinforcement:
    config = configs.RunConfig(
        precision="float32",
        grpo=configs.GRPOConfig(steps=1, batch_size=4),
        rollout=configs.RolloutConfig(max_new_tokens=8, completion_tokens=(6, 3, 16)),
    )
    mesh = sharding.make_mesh(configs.MeshConfig(fsdp=2, tensor=2))
    model = programs.abstract_model(config, micro.CONFIG, mesh)
    return programs.build_reinforcement(config, mesh, model, read_text=read_text, end_tokens=(1,))


def one_each(answers):
    return answers.box_iou * answers.text["box_found"] + answers.targets.mask.any((1, 2))[:, None]


def one_for_all(answers):
    return answers.lengths.mean()


def mistaken(answers):
    return answers.masks


def test_channels_of_ones_own_are_tried_before_anything_else():
    def check(name, **grpo):
        rewards = configs.RewardsConfig(custom=(f"{__name__}:{name}",), custom_weights=(1.0,))
        stage = configs.GRPOConfig(**{"steps": 1} | grpo)
        programs.check_rewards(configs.RunConfig(grpo=stage, rewards=rewards))

    check("one_each")
    check("mistaken", steps=0)
    with pytest.raises(configs.ConfigError, match=r"one_for_all .* shape \(\), expected one"):
        check("one_for_all")
    with pytest.raises(configs.ConfigError, match="mistaken cannot be computed: AttributeError"):
        check("mistaken", policy_weight=0.0)


def test_buckets_of_completions(stage):
    """Ascending, no longer than what is sampled, and cut off without a trace."""
    assert stage.completion_tokens == (3, 6, 8)
    rng = np.random.default_rng(0)
    written = Rollout(
        tokens=rng.integers(0, 60, (2, 3, 8)),
        lengths=rng.integers(1, 4, (2, 3)),
        log_probs=rng.standard_normal((2, 3, 8)).astype(np.float32),
        ended=np.ones((2, 3), bool),
    )
    cut = stage.trim(written, 3)
    np.testing.assert_array_equal(cut.tokens, written.tokens[..., :3])
    np.testing.assert_array_equal(cut.log_probs, written.log_probs[..., :3])
    np.testing.assert_array_equal(cut.lengths, written.lengths)


def test_a_stage_takes_the_parameters_and_gives_them_back(stage):
    params = nnx.state(micro.model())
    before = nnx.to_pure_dict(params)
    trained, frozen = stage.split(params)
    policy = nnx.to_pure_dict(stage.policy(trained, frozen))
    assert set(policy) == {"visual", "language"}
    state = stage.create(jax.tree.map(jnp.copy, trained))
    after = nnx.to_pure_dict(nnx.State.merge(state.params, frozen))
    jax.tree.map(np.testing.assert_array_equal, after, before)
