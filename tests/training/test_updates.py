"""The updates as programs: the same on a mesh as on one device, donated, compiled once, no host."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.config import GRPOConfig
from lens_jax.distribution import sharding
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import Score
from lens_jax.rewards.unified import Rewards
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import grpo
from lens_jax.training.advantages import RULES
from tests import micro
from tests.training.stages import MESHES, B, Program, mesh_of

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True, scope="module")
def every_parameter_is_cut():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sharding.parameter_spec.__kwdefaults__, "min_elements", 0)
        yield


@pytest.fixture(scope="module")
def expected():
    """The first step of each stage on one device, in one micro-batch."""
    results = {}
    for name in ("alignment", "grpo"):
        program = Program(name, mesh_of(1, data=1))
        metrics = program.step()
        results[name] = metrics, *jax.device_get((program.adam.mu, program.state.params))
    return results


def test_the_batch_gives_something_to_learn(expected):
    metrics, *_ = expected["grpo"]
    for name in ("reward/format", "reward/box", "mask_iou", "kl", "truncated_fraction"):
        assert metrics[name] > 0, name
    assert metrics["reward/box"] < 1 and metrics["reward/format"] < 1
    for metrics, *_ in expected.values():
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
    for name, paths in learns.items():
        program = Program(name, mesh_of(1, data=1), shapes=micro.WITH_SAM1)
        metrics = program.step()
        assert np.isfinite(list(metrics.values())).all()
        assert metrics["grad_norm"] > 1e-3 and metrics["mask_iou"] > 0
        gradients = {
            "/".join(map(str, path)): np.asarray(x[...])
            for path, x in nnx.to_flat_state(program.adam.mu)
        }
        assert all(gradients[path].any() for path in paths)
        assert not any(path.startswith("sam/image_encoder") for path in gradients)


def relative(got, want):
    """How far two trees are apart, as norms."""
    norm = lambda arrays: np.sqrt(sum(np.square(x, dtype="f8").sum() for x in arrays))  # noqa: E731
    got, want = (jax.tree.leaves(jax.device_get(tree)) for tree in (got, want))
    return norm([a - b for a, b in zip(got, want, strict=True)]) / norm(want)


# By night, stage 1 where stage 2 computes all that it does and more, `data` alone, and large
# `tensor`s.
RARE = {"alignment": ("8x1x1", "1x4x2", "1x2x4", "1x1x8"), "grpo": ("8x1x1", "1x2x4", "1x1x8")}
UPDATES = [
    pytest.param(name, mesh, marks=pytest.mark.nightly if rare else (), id=f"{name}-{mesh}")
    for name in RARE
    for mesh in MESHES
    for rare in [mesh in RARE[name]]
]


@pytest.mark.parametrize(("name", "mesh"), UPDATES)
def test_update_on_a_mesh(expected, name, mesh):
    """In two micro-batches too: equal up to rounding, in place, compiled once; every array is
    cut."""
    metrics, gradients, params = expected[name]
    mesh = mesh_of(**MESHES[mesh])
    program = Program(name, mesh, halves=sharding.num_parts(mesh) < B)
    first = program.state
    specs = jax.tree.map(lambda x: x.sharding, first)
    for axis in ("fsdp", "tensor"):
        cut = any(axis in x.spec for x in jax.tree.leaves(specs.params))
        assert cut == (mesh.shape[axis] > 1)
    # Left to the compiler, moments would be whole on every device.
    adam = jax.tree.map(lambda x: x.sharding, program.adam)
    assert adam.mu == adam.nu == specs.params

    ours = program.step()
    assert ours.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
    assert relative(program.adam.mu, gradients) < 1e-5
    assert relative(program.state.params, params) < 1e-5

    assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.moments)))
    program.step()
    assert program.stage.update._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, program.state)
    same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), specs, after, program.state)
    assert all(jax.tree.leaves(same))


# XLA's CPU compiler crashes at the sums that scatter gradients in bfloat16, as `fsdp` needs them.
@pytest.mark.parametrize("data", [1, 2])
def test_bfloat16_stays_near_float32(expected, data):
    """Products keep 8 bits; parameters and moments are in float32."""
    metrics, gradients, _ = expected["grpo"]
    program = Program("grpo", mesh_of(data, data=data), precision="bfloat16")
    ours = program.step()
    for key in ("loss", "mask_bce", "mask_dice", "kl", "grad_norm"):
        np.testing.assert_allclose(ours[key], metrics[key], rtol=0.03, err_msg=key)
    assert relative(program.adam.mu, gradients) < 0.1
    assert {x.dtype for x in jax.tree.leaves(program.state.params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [P("data"), P(None, "data"), P("data", "fsdp")], ids=str)
def test_group_statistics_of_a_group_in_parts(rule, spread):
    """Completions of one group on several devices: mean and deviation are still the group's."""
    rewards = np.random.default_rng(0).random((4, 8), np.float32)
    rewards[1] = 0.5
    placed = jax.device_put(rewards, NamedSharding(mesh_of(data=4, fsdp=2), spread))
    micro.close(jax.jit(RULES[rule])(placed), RULES[rule](rewards))


@pytest.mark.parametrize("name", ["alignment", "grpo"])
def test_no_host_inside_the_update(name):
    program = Program(name, mesh_of(1, data=1))
    text = program.stage.update.lower(program.state, *program.arguments).as_text()
    assert "callback" not in text
    # A callback would show.
    loud = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0).as_text()
    assert "callback" in loud


@pytest.mark.parametrize("settings", [dict(beta=0.0), dict(policy_weight=0.0)], ids=str)
def test_without_kl_no_reference_is_asked_for(settings):
    program = Program("grpo", mesh_of(1, data=1), **settings)
    assert not program.stage.needs_reference
    frozen, _, *rows = program.arguments
    _, metrics = jax.eval_shape(program.stage.update, program.state, frozen, None, *rows)
    assert metrics["kl"].shape == ()


class Scripted:
    """A model whose scores are given: log-probs [B, G, T] and nothing else of interest."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    embed = sam_features = lambda self, prompts: None

    def score(self, *_, **__):
        return Score(self.log_probs, jnp.zeros_like(self.log_probs))

    def decode_masks(self, *_, **__):
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
        return grpo.sums(*models, batch, rollout, reward, GRPOConfig(beta=0.1))[0]

    ours = gradient(jnp.asarray(policy))
    assert (np.asarray(ours)[counted] != 0).all() and (np.asarray(ours)[~counted] == 0).all()
    wild = np.where(counted, policy, -1e4).astype(np.float32)
    np.testing.assert_array_equal(gradient(jnp.asarray(wild)), ours)
