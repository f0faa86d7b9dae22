"""Completions and masks are the same on every mesh as on one device."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from lens_jax import checkpoints
from lens_jax.distribution import sharding
from lens_jax.inference import Generation, Lens
from tests import micro
from tests.training import stages
from tests.training.stages import MESHES, mesh_of

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def every_parameter_is_cut(monkeypatch):
    monkeypatch.setitem(sharding.parameter_spec.__kwdefaults__, "min_elements", 0)


def respond(mesh):
    """Greedy completions of the batch, and their masks, as an evaluation has them."""
    model, tokenizer, batch = stages.make_model(micro.CONFIG)
    definition, params = nnx.split(model)
    places = sharding.shardings(params, mesh, model.config.axes)
    cut = {axis for place in jax.tree.leaves(places) for axis in place.spec if axis}
    assert cut == {axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}
    generation = Generation(end_tokens=tuple(range(0, 500, 9)), max_new_tokens=12)
    params = stages.spread(params, places)
    lens = Lens(definition, params, SimpleNamespace(tokenizer=tokenizer), generation, mesh)
    return lens.respond(batch.prompts, batch.sample_id)


@pytest.fixture(scope="module")
def sampled():
    return jax.device_get(stages.sample(mesh_of(1, data=1)))


@pytest.fixture(scope="module")
def answered():
    return respond(mesh_of(1, data=1))


# One that cuts everything always, the others by night: they are the same programs.
SOME = [
    name if name == "2x2x2" else pytest.param(name, marks=pytest.mark.nightly) for name in MESHES
]


@pytest.mark.parametrize("mesh", SOME)
def test_sampled_completions(sampled, mesh):
    ours = jax.device_get(stages.sample(mesh_of(**MESHES[mesh])))
    assert 1 < sampled.lengths.mean() < 12 and len(np.unique(sampled.lengths)) > 3
    for name in ("tokens", "lengths", "ended"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(sampled, name), err_msg=name)
    np.testing.assert_allclose(ours.log_probs, sampled.log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", SOME)
def test_greedy_completions_and_masks(answered, mesh):
    ours = respond(mesh_of(**MESHES[mesh]))
    for name in ("tokens", "lengths", "ended", "box_found"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(answered, name), err_msg=name)
    micro.close(ours.mask_logits, answered.mask_logits, 1e-4)
    clear = np.abs(answered.mask_logits) > 1e-4
    np.testing.assert_array_equal((ours.mask_logits > 0)[clear], (answered.mask_logits > 0)[clear])


def test_one_device_goes_on_where_eight_stopped(tmp_path):
    """Parameters, moments and the position in the data, from eight parts to a whole."""
    many = stages.Program("alignment", mesh_of(**MESHES["1x8x1"]))
    alone = stages.Program("alignment", mesh_of(1, data=1))
    many.step()
    assert any("fsdp" in x.sharding.spec for x in jax.tree.leaves(many.state.moments))
    store = checkpoints.TrainingCheckpoints(tmp_path, keep=1)
    store.save(1, {"state": many.state, "position": stages.B})
    store.wait()
    saved = jax.device_get((many.state.params, many.state.moments))

    restored = store.restore(1, {"state": alone.state, "position": 0})
    alone.state, position = restored["state"], restored["position"]
    assert position == stages.B and alone.state.step == 1
    for x, want in zip(
        jax.tree.leaves((alone.state.params, alone.state.moments)),
        jax.tree.leaves(saved),
        strict=True,
    ):
        assert x.sharding.device_set == {jax.devices()[0]}
        np.testing.assert_array_equal(x, want)

    theirs, ours = many.step(), alone.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    ours, theirs = jax.device_get((alone.state.params, many.state.params))
    apart = optax.tree.norm(jax.tree.map(np.subtract, ours, theirs))
    assert apart < 1e-5 * optax.tree.norm(theirs)
