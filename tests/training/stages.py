"""Both stages on a micro configuration: their updates with arguments, on any mesh."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer

from lens_jax.config import AlignmentConfig, GRPOConfig, MeshConfig, RolloutConfig, RunConfig
from lens_jax.distribution import parallel, sharding
from lens_jax.distribution.rows import Share
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensModel, split_policy
from lens_jax.models.parameters import select
from lens_jax.rewards import text_rewards
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import alignment, grpo, programs
from lens_jax.training.state import create, make_optimizer
from tests import micro

B, G = 16, 2
TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"

OBJECTIVE = grpo.Objective(beta=0.1)
# A run's optimizer, behind one whose state are the last gradients, to be compared themselves.
OPTIMIZER = optax.chain(
    optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (gradients, gradients),
    ),
    make_optimizer(
        optax.constant_schedule(1e-4), b1=0.9, b2=0.99, weight_decay=0.0, max_grad_norm=1.0
    ),
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


@dataclasses.dataclass
class Stage:
    """An update and its arguments `(state of trained, *params, *data)`, all on the host."""

    make_update: Callable
    trained: Any
    params: tuple
    data: tuple


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


def make_stages(config) -> dict[str, Stage]:
    model, tokenizer, batch = make_model(config)

    definition, trained, frozen = nnx.split(model, select(AlignmentConfig().trained), ...)
    align = Stage(
        lambda optimizer, portions, **options: alignment.make_update(
            definition, optimizer, portions, **options
        ),
        trained,
        (frozen,),
        (batch,),
    )

    _, policy, rest = split_policy(model)
    reference = jax.tree.map(lambda x: 1.03 * x, policy)
    absent = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    reward = UnifiedReward(text_rewards(tokenizer), format=1.0)
    definition_grpo, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    reinforce = Stage(
        lambda optimizer, portions, objective=OBJECTIVE, **options: grpo.make_update(
            definition_grpo, absent, optimizer, reward, objective, portions, **options
        ),
        trained,
        (frozen, reference),
        (batch, completions(tokenizer, batch.targets.box)),
    )
    return {"alignment": align, "grpo": reinforce}


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


def sample(mesh: jax.sharding.Mesh) -> Rollout:
    """Completions of the batch, drawn as stage 2 draws them."""
    model, tokenizer, batch = make_model(micro.CONFIG)
    config = RunConfig(
        precision="float32",
        grpo=GRPOConfig(steps=1, num_generations=G),
        rollout=RolloutConfig(max_new_tokens=12, temperature=1.0, top_k=40, top_p=0.95),
    )
    stage = programs.build_reinforcement(
        config,
        mesh,
        model,
        read_text=text_rewards(tokenizer),
        # Some of very many tokens, so that completions end at different lengths.
        end_tokens=range(0, model.config.mllm.vocab_size, 9),
    )
    _, policy, _ = split_policy(model)
    policy = spread(policy, sharding.shardings(policy, mesh, kv_heads=2))
    batch = sharding.global_batch(rows_of(batch, sharding.share(mesh)), mesh)
    return stage.write(stage.relayout(policy), batch, np.int32(0))


class Program:
    """A stage's update on a mesh, everything placed as a run places it."""

    def __init__(self, stage: Stage, mesh: jax.sharding.Mesh, portions: int, **options):
        place = partial(sharding.shardings, mesh=mesh, kv_heads=2, **options)
        make = partial(create, optimizer=OPTIMIZER)
        places = place(jax.eval_shape(make, stage.trained))
        self.state = jax.jit(make, out_shardings=places)(stage.trained)
        params = [spread(tree, place(tree)) for tree in stage.params]
        share = sharding.share(mesh)
        batches = (sharding.global_batch(rows_of(x, share), mesh) for x in stage.data)
        self.arguments = (*params, *batches)
        devices = parallel.Devices(mesh, jnp.float32, {"kv_heads": 2} | options)
        self.update = jax.jit(
            stage.make_update(OPTIMIZER, portions, differentiate=devices.differentiate),
            donate_argnums=0,
            out_shardings=(places, None),
        )

    def step(self):
        self.state, metrics = self.update(self.state, *self.arguments)
        return jax.device_get(metrics)

    @property
    def gradients(self):
        """Of the last step."""
        return self.state.moments[0]
