"""The updates as programs: the same on a mesh as on one device, donated, compiled once, no host."""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import AutoTokenizer

from lens_jax import sharding
from lens_jax.config import AlignmentConfig, GRPOConfig, MeshConfig
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import Score, split_policy
from lens_jax.rewards import text_rewards
from lens_jax.rewards.unified import Rewards, UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import alignment, grpo
from lens_jax.training.state import among, create, split
from tests import micro

B, G = 16, 2
TOKENIZER = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"

OBJECTIVE = grpo.Objective(beta=0.1)
# Its state are the last gradients: they can be compared without what an optimizer makes of them.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, state, params: (jax.tree.map(lambda g: -0.01 * g, gradients), gradients),
)


@dataclasses.dataclass
class Stage:
    """An update and its arguments `(state of trained, *params, *data)`, all on the host."""

    make_update: callable
    trained: object
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


def make_stages(config) -> dict[str, Stage]:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    size = len(tokenizer) + 9
    mllm = dataclasses.replace(config.mllm, vocab_size=size, image_token_id=size - 1)
    config = dataclasses.replace(config, mllm=mllm)
    model = micro.model(config)
    shapes = [((4, 4), (3, 4)), ((6, 4), (1, 2))]
    rows = [micro.row(config, *shapes[i % 2], seed=i) for i in range(B)]
    targets = micro.targets(B)
    batch = Batch(micro.collate(config, rows), targets, np.arange(B, dtype=np.int32))

    definition, trained, frozen = split(model, among(AlignmentConfig().trained))
    align = Stage(
        lambda optimizer, portions: alignment.make_update(definition, optimizer, portions),
        trained,
        (frozen,),
        (batch,),
    )

    _, policy, rest = split_policy(model)
    reference = jax.tree.map(lambda x: 1.03 * x, policy)
    absent = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    reward = UnifiedReward(text_rewards(tokenizer), format=1.0)
    definition_grpo, trained, frozen = split(model, among(GRPOConfig().trained))
    reinforce = Stage(
        lambda optimizer, portions, objective=OBJECTIVE: grpo.make_update(
            definition_grpo, absent, optimizer, reward, objective, portions
        ),
        trained,
        (frozen, reference),
        (batch, completions(tokenizer, targets.box)),
    )
    return {"alignment": align, "grpo": reinforce}


@pytest.fixture(scope="module")
def stages():
    return make_stages(micro.CONFIG)


class Program:
    """A stage's update on a mesh, everything placed as a run places it."""

    def __init__(self, stage: Stage, mesh: jax.sharding.Mesh, portions: int, **options):
        place = partial(sharding.shardings, mesh=mesh, kv_heads=2, **options)
        make = partial(create, optimizer=KEEP_GRADIENTS)
        places = place(jax.eval_shape(make, stage.trained))
        self.state = jax.jit(make, out_shardings=places)(stage.trained)
        params = [jax.device_put(tree, place(tree)) for tree in stage.params]
        self.arguments = (*params, *(sharding.global_batch(x, mesh) for x in stage.data))
        self.update = jax.jit(
            stage.make_update(KEEP_GRADIENTS, portions),
            donate_argnums=0,
            out_shardings=(places, None),
        )

    def step(self):
        self.state, metrics = self.update(self.state, *self.arguments)
        return jax.device_get(metrics)


def mesh_of(devices=8, **axes):
    return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


@pytest.fixture(scope="module")
def expected(stages):
    """The first step of each stage on one device, in one portion."""
    results = {}
    for name, stage in stages.items():
        program = Program(stage, mesh_of(1, data=1), 1)
        metrics = program.step()
        results[name] = metrics, jax.device_get(program.state.moments)
    return results


def test_the_batch_gives_something_to_learn(expected):
    metrics, _ = expected["grpo"]
    for name in ("reward/format", "reward/box", "mask_iou", "kl", "truncated_fraction"):
        assert metrics[name] > 0, name
    assert metrics["reward/box"] < 1 and metrics["reward/format"] < 1
    for metrics, _ in expected.values():
        assert np.isfinite(list(metrics.values())).all()
        assert metrics["grad_norm"] > 1e-3 and metrics["skipped_updates"] == 0


def test_sam1_trains_as_sam2_does():
    """A step of each stage; in stage 2 what prompts and decodes learns along."""
    learns = {
        "alignment": {"context/queries"},
        "grpo": {
            "context/queries",
            "sam/sam_prompt_encoder/no_mask_embed/embedding",
            "sam/sam_mask_decoder/mask_tokens/embedding",
            "sam/sam_mask_decoder/output_upscaling/conv1/kernel",
        },
    }
    for name, stage in make_stages(micro.WITH_SAM1).items():
        program = Program(stage, mesh_of(1, data=1), 1)
        metrics = program.step()
        assert np.isfinite(list(metrics.values())).all()
        assert metrics["grad_norm"] > 1e-3 and metrics["mask_iou"] > 0
        gradients = {
            "/".join(map(str, path)): np.asarray(x[...])
            for path, x in nnx.to_flat_state(program.state.moments)
        }
        assert all(gradients[path].any() for path in learns[name])
        assert not any(path.startswith("sam/image_encoder") for path in gradients)


CASES = {  # stage, mesh, options of the table
    "alignment, data": ("alignment", dict(data=8), {}),
    "alignment, all parameters cut": ("alignment", dict(fsdp=4, tensor=2), dict(min_elements=0)),
    "grpo, data": ("grpo", dict(data=8), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_update_on_a_mesh(stages, expected, case):
    """In two portions too: equal up to rounding, in place, compiled once."""
    name, axes, options = CASES[case]
    metrics, gradients = expected[name]
    program = Program(stages[name], mesh_of(**axes), 2, **options)
    first = program.state
    specs = jax.tree.map(lambda x: x.sharding, first)
    assert bool(options) == any(not s.is_fully_replicated for s in jax.tree.leaves(specs))

    ours = program.step()
    assert ours.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    got, want = (jax.tree.leaves(t) for t in (jax.device_get(program.state.moments), gradients))
    norm = lambda arrays: np.sqrt(sum(np.square(x, dtype="f8").sum() for x in arrays))  # noqa: E731
    difference = [a - b for a, b in zip(got, want, strict=True)]
    assert norm(difference) < 1e-5 * norm(want)

    assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.moments)))
    program.step()
    assert program.update._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, program.state)
    same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), specs, after, program.state)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["alignment", "grpo"])
def test_no_host_inside_the_update(stages, name):
    program = Program(stages[name], mesh_of(1, data=1), 1)
    text = program.update.lower(program.state, *program.arguments).as_text()
    assert "callback" not in text
    # A callback would show.
    loud = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0).as_text()
    assert "callback" in loud


@pytest.mark.parametrize("objective", [dict(beta=0.0), dict(policy_weight=0.0)], ids=str)
def test_without_kl_no_reference_is_asked_for(stages, objective):
    stage = stages["grpo"]
    update = stage.make_update(KEEP_GRADIENTS, 1, grpo.Objective(**objective))
    state = create(stage.trained, KEEP_GRADIENTS)
    _, metrics = jax.eval_shape(update, state, stage.params[0], None, *stage.data)
    assert metrics["kl"].shape == ()


class Scripted:
    """A model whose scores are given: log-probs [B, G, T] and nothing else of interest."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    embed = sam_features = lambda self, prompts: None

    def score(self, *_, **__):
        return Score(self.log_probs, jnp.zeros_like(self.log_probs))

    def masks(self, *_, **__):
        return SimpleNamespace(logits=jnp.zeros((*self.log_probs.shape[:2], 4, 4)))


def test_log_probs_past_the_end_never_matter():
    """They are arbitrary; even an overflow of the KL term there must not reach the gradient."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 5)
    lengths = np.array([[5, 1, 0], [2, 4, 3]])
    counted = np.arange(shape[2]) < lengths[..., None]
    policy, reference = (rng.standard_normal(shape, np.float32) for _ in range(2))
    rollout = Rollout(np.zeros(shape, np.int32), lengths, policy, np.ones(shape[:2], bool))
    batch = Batch(None, micro.targets(shape[0]), np.arange(shape[0]))
    earned = rng.random(shape[:2], np.float32)

    def reward(*_):
        return Rewards(earned[..., None], earned, earned, earned, ("box",))

    @jax.jit
    @jax.grad
    def gradient(policy):
        models = Scripted(policy), Scripted(jnp.asarray(reference))
        return grpo.sums(*models, batch, rollout, reward, grpo.Objective(beta=0.1))[0]

    ours = gradient(jnp.asarray(policy))
    assert (np.asarray(ours)[counted] != 0).all() and (np.asarray(ours)[~counted] == 0).all()
    wild = np.where(counted, policy, -1e4).astype(np.float32)
    np.testing.assert_array_equal(gradient(jnp.asarray(wild)), ours)
