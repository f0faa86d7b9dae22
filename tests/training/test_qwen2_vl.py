"""One step of each stage with Qwen2-VL, boxes in 0..1000 (the KL is no business of the tower)."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer

from lens_jax import checkpoints
from lens_jax.config import AlignmentConfig, GRPOConfig, RewardsConfig
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import split_policy
from lens_jax.models.parameters import select
from lens_jax.rewards import text_rewards
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import alignment, grpo
from lens_jax.training.state import create
from tests import micro

TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"

# Its state are the last gradients.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params: (jax.tree.map(lambda g: -0.01 * g, gradients), gradients),
)
BOXES = [[100, 200, 500, 600], [0, 0, 1000, 1000]]
ANSWERS = ["(100,200),(500,600)", "(100,200),(300,600)", "(0,0),(1000,1000)", "nowhere"]
BOX_REWARDS = [1, 0.25, 1, 0]  # squared IoU


def test_a_step_of_each_stage():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = len(tokenizer) + 1
    mllm = dataclasses.replace(micro.QWEN2_VL.mllm, vocab_size=size, image_token_id=size - 1)
    config = dataclasses.replace(micro.QWEN2_VL, mllm=mllm)
    model = micro.model(config)
    rows = [micro.row(config, (4, 4), (3, 4), 0), micro.row(config, (6, 10), (1, 2), 1)]
    targets = dataclasses.replace(micro.targets(2), box=np.array(BOXES, np.float32))
    batch = Batch(micro.collate(config, rows), targets, np.arange(2, dtype=np.int32))

    definition, trained, frozen = nnx.split(model, select(AlignmentConfig().trained), ...)
    update = alignment.make_update(definition, KEEP_GRADIENTS)
    state, metrics = jax.jit(update)(create(trained, KEEP_GRADIENTS), frozen, batch)
    check(state, metrics, trains=("context/",))

    texts = [f"<|box_start|>{answer}<|box_end|><|im_end|>" for answer in ANSWERS]
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(x) for x in ids], np.int32).reshape(2, 2)
    tokens = np.zeros((2, 2, lengths.max()), np.int32)
    for i, x in enumerate(ids):
        tokens[i // 2, i % 2, : len(x)] = x
    written = Rollout(tokens, lengths, np.zeros(tokens.shape, np.float32), np.ones((2, 2), bool))
    _, policy, rest = split_policy(model)
    absent = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    reward = UnifiedReward(text_rewards(tokenizer), RewardsConfig())
    definition, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    settings = GRPOConfig(beta=0.0)
    update = grpo.make_update(definition, absent, KEEP_GRADIENTS, reward, settings)
    state, metrics = jax.jit(update)(
        create(trained, KEEP_GRADIENTS), frozen, policy, batch, written
    )
    check(state, metrics, trains=("visual/", "language/", "context/", "sam/"))
    assert np.isclose(float(metrics["reward/box"]), np.mean(BOX_REWARDS), atol=1e-5)


def check(state, metrics, trains):
    """The step is finite, and every part of the vision tower that trains has a gradient."""
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    gradients = dict(checkpoints.unstack(jax.device_get(state.moments.to_pure_dict())))
    assert {name.split("/")[0] + "/" for name in gradients} == set(trains)
    visual = {name: x for name, x in gradients.items() if name.startswith("visual/")}
    still = [name for name, x in visual.items() if not np.abs(x).max() > 0]
    assert not still
    if "visual/" in trains:
        assert {"visual/blocks/1/fc1/kernel", "visual/merger/norm/bias"} <= visual.keys()
