"""Both stages on a micro configuration: the programs of a run with their arguments, on any mesh."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer

from lens_jax.config import (
    AlignmentConfig,
    GRPOConfig,
    MeshConfig,
    RewardsConfig,
    RolloutConfig,
    RunConfig,
)
from lens_jax.distribution import sharding
from lens_jax.distribution.rows import Share
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel, split_policy
from lens_jax.rewards import text_rewards
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import programs
from tests import micro

B, G = 16, 2
TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"

ADAM = dict(learning_rate=1e-4, schedule="constant", warmup_steps=0, b2=0.99)
CONFIG = RunConfig(
    precision="float32",
    remat="none",
    alignment=AlignmentConfig(steps=3, batch_size=B, **ADAM),
    grpo=GRPOConfig(steps=3, batch_size=B, num_generations=G, beta=0.1, **ADAM),
    rollout=RolloutConfig(max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95),
    rewards=RewardsConfig(format=1.0),
)


# data x fsdp x tensor
MESHES = {
    "8x1x1": dict(data=8),
    "1x8x1": dict(fsdp=8),
    "2x2x2": dict(data=2, fsdp=2, tensor=2),
    "1x4x2": dict(fsdp=4, tensor=2),
    # `tensor` above the number of KV heads, and above that of heads.
    "1x2x4": dict(fsdp=2, tensor=4),
    "1x1x8": dict(tensor=8),
}


def completions(tokenizer, boxes) -> Rollout:
    """Texts with boxes near the true ones, of different lengths, the last one without its end."""
    rng = np.random.default_rng(0)
    rows = []
    for i, box in enumerate(np.repeat(boxes, G, axis=0).astype(int)):
        x0, y0, x1, y1 = box + rng.integers(-4, 5, 4)
        text = f"<|object_ref_start|>a<|object_ref_end|><|box_start|>({x0},{y0}),({x1},{y1})"
        text += "<|box_end|><|im_end|>"
        rows.append(tokenizer.encode("red " * (i % 3) + text if i % 5 else "none<|im_end|>"))
    rows[-1].pop()
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.array([row + [0] * (max(lengths) - len(row)) for row in rows], np.int32)
    ended = np.arange(B * G) < B * G - 1
    log_probs = -rng.random(tokens.shape, np.float32)
    grouped = (x.reshape(B, G, *x.shape[1:]) for x in (tokens, lengths, log_probs, ended))
    return Rollout(*grouped)


def make_model(config) -> tuple[LensModel, Any, Batch]:
    """A model with the vocabulary of the tiny tokenizer, that one, and a batch."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = len(tokenizer) + 9
    mllm = dataclasses.replace(config.mllm, vocab_size=size, image_token_id=size - 1)
    config = dataclasses.replace(config, mllm=mllm)
    shapes = [((4, 4), (3, 4)), ((6, 4), (1, 2))]
    rows = [micro.row(config, *shapes[i % 2], seed=i) for i in range(B)]
    batch = Batch(micro.collate(config, rows), micro.targets(B), np.arange(B, dtype=np.int32))
    return micro.model(config), tokenizer, batch


def mesh_of(devices=8, **axes):
    return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


def rows_of(batch, share: Share):
    """What one process reads of a batch."""

    def take(x):
        parts = np.split(np.asarray(x), share.count)
        return np.concatenate([parts[part] for part in share.parts])

    return jax.tree.map(take, batch)


def spread(tree, places):
    """Arrays that every process holds, as global ones."""
    put = lambda x, place: jax.make_array_from_callback(x.shape, place, np.asarray(x).__getitem__)  # noqa: E731
    return jax.tree.map(put, tree, places)


class Program:
    """A stage's update as `programs` builds it, with arguments that lie as those of a run.

    Args:
        name: of the stage.
        shapes: the model's.
        halves: each device cuts its rows into two micro-batches.
        changes: keys of the stage; `precision` is the run's.
    """

    def __init__(
        self,
        name: str,
        mesh: jax.sharding.Mesh,
        *,
        shapes: LensConfig = micro.CONFIG,
        halves: bool = False,
        precision: str = "float32",
        **changes: Any,
    ):
        model, tokenizer, batch = make_model(shapes)
        if halves:
            changes["per_device_batch_size"] = B // sharding.num_parts(mesh) // 2
        settings = dataclasses.replace(getattr(CONFIG, name), **changes)
        config = dataclasses.replace(CONFIG, precision=precision, **{name: settings})
        self.precision = programs.precision(config)
        abstract = programs.abstract_model(config, model.config, mesh)
        if name == "alignment":
            self.stage = programs.build_alignment(config, mesh, abstract)
        else:
            self.stage = build_reinforcement(config, mesh, abstract, tokenizer, end_tokens=(0,))
        params = nnx.state(model)
        params = spread(params, sharding.shardings(params, mesh, model.config.axes))
        trained, frozen = self.stage.split(params)
        rows = [batch]
        self.arguments = [frozen]
        if name == "grpo":
            policy = jax.tree.map(lambda x: 1.03 * x, self.stage.policy(trained, frozen))
            self.arguments.append(self.stage.cast(policy) if settings.beta else None)
            rows.append(completions(tokenizer, batch.targets.box))
        share = sharding.share(mesh)
        self.arguments += [sharding.global_batch(rows_of(x, share), mesh) for x in rows]
        self.state = self.stage.create(trained)

    def step(self) -> dict[str, Any]:
        """Takes a step; returns its metrics."""
        with self.precision:
            self.state, metrics = self.stage.update(self.state, *self.arguments)
        return jax.device_get(metrics)

    @property
    def adam(self) -> optax.ScaleByAdamState:
        """Moments; after the first step `mu` is a tenth of the clipped gradients."""
        is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
        return next(x for x in jax.tree.leaves(self.state.moments, is_leaf=is_adam) if is_adam(x))


def build_reinforcement(config, mesh, model, tokenizer, end_tokens) -> programs.Reinforcement:
    return programs.build_reinforcement(
        config, mesh, model, read_text=text_rewards(tokenizer), end_tokens=end_tokens
    )


def sample(mesh: jax.sharding.Mesh) -> Rollout:
    """Completions of the batch, drawn as stage 2 draws them."""
    model, tokenizer, batch = make_model(micro.CONFIG)
    # Some of very many tokens, so that completions end at different lengths.
    ends = range(0, model.config.mllm.vocab_size, 9)
    stage = build_reinforcement(CONFIG, mesh, model, tokenizer, ends)
    _, policy, _ = split_policy(model)
    policy = spread(policy, sharding.shardings(policy, mesh, model.config.axes))
    batch = sharding.global_batch(rows_of(batch, sharding.share(mesh)), mesh)
    return stage.sample(stage.reshard(policy), batch, np.int32(0))
