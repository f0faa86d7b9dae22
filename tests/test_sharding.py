"""The mesh and the table of parameters, on eight virtual devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.aot import hlo
from lens_jax.config import ConfigError, MeshConfig
from lens_jax.distribution import sharding
from lens_jax.distribution.rows import Share
from lens_jax.models.parameters import parameter_axes
from tests import tpu


def mesh_of(data=1, fsdp=1, tensor=1):
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


AXES = parameter_axes(kv_heads=2)


def spec(name, shape, mesh):
    return sharding.parameter_spec(name, shape, mesh, AXES, min_elements=0)


def test_no_mesh_named_takes_every_device():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert one.size == 1
    # Batches that do not divide leave a factor to `tensor`.
    for rows, fsdp in ((64, 8), (4, 4), (6, 2), (3, 1)):
        shape = {"data": 1, "fsdp": fsdp, "tensor": 8 // fsdp}
        assert dict(sharding.make_mesh(MeshConfig(), rows=rows).shape) == shape


@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4", "v5p:2x2x4"])
def test_axes_that_the_grid_of_chips_does_not_have(topology):
    mesh = sharding.make_mesh(MeshConfig(), tpu.devices(topology), rows=8)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 2}
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_between_slices_lies_data_alone():
    devices = tpu.devices("v5e:2x2", slices=2)
    for config, shape in (
        (MeshConfig(), (2, 4, 1)),
        (MeshConfig(data=4, tensor=2), (4, 1, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ):
        mesh = sharding.make_mesh(config, devices)
        assert tuple(mesh.shape.values()) == shape
        for half in np.split(mesh.devices, 2):
            assert len({device.slice_index for device in half.flat}) == 1
    with pytest.raises(ConfigError, match=r"mesh\.data must be a multiple of 2, the slices"):
        sharding.make_mesh(MeshConfig(fsdp=8), devices)


@pytest.mark.compiled
def test_between_slices_travel_sums_of_gradients_in_parts():
    """Weights are gathered within each slice; of their gradient a chip sends what it keeps."""
    mesh = sharding.make_mesh(MeshConfig(), tpu.devices("v5e:2x2", slices=2))
    place = NamedSharding(mesh, P("fsdp"))
    kernel = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=place)
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=sharding.batch_sharding(mesh))
    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.tanh(x @ kernel).sum()), out_shardings=place)
    moved = hlo.Module(gradient.lower(kernel, x).compile().as_text()).collective_bytes()
    assert moved["between slices"] == 4 * 512 * 512 / 4
    assert moved["all-gather"] in (2 * 512 * 512, 4 * 512 * 512)


def test_named_axes_leave_the_others_at_one():
    assert dict(sharding.make_mesh(MeshConfig(data=4)).shape) == {"data": 4, "fsdp": 1, "tensor": 1}


def test_too_many_devices_says_which_axes():
    with pytest.raises(ConfigError, match=r"mesh.data 3 x mesh.fsdp 4 x mesh.tensor 1 = 12 .* 8 "):
        mesh_of(data=3, fsdp=4)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("language/layers/q_proj/kernel", (3, 64, 64), P(None, "fsdp", "tensor")),
        ("language/layers/q_proj/bias", (3, 64), P(None, "tensor")),
        ("language/layers/o_proj/kernel", (3, 64, 64), P(None, "tensor", "fsdp")),
        ("language/layers/down_proj/kernel", (3, 128, 64), P(None, "tensor", "fsdp")),
        ("language/embed_tokens/embedding", (608, 64), P("tensor", "fsdp")),
        ("language/embed_tokens/embedding", (607, 64), P(None, "fsdp")),
        ("language/layers/gate_proj/kernel", (4, 62, 128), P(None, None, "tensor")),
        ("visual/blocks/qkv/kernel", (4, 32, 96), P(None, "fsdp", None)),
        ("visual/blocks/proj/kernel", (4, 32, 36), P(None, None, "fsdp")),
        ("context/conv/kernel", (8, 64, 64), P(None, "fsdp", None)),
        ("sam/trunk/blocks/0/proj/kernel", (64, 32), P("fsdp", None)),
        ("language/norm/scale", (64,), P(None)),
    ],
)
def test_table(path, shape, expected):
    mesh = mesh_of(fsdp=4, tensor=2)
    assert spec(path, shape, mesh) == expected
    # Optimizer moments lie as their parameters do.
    assert spec(f"optimizer/0/mu/{path}", shape, mesh) == expected


def test_kv_heads_are_never_cut_inside_a_head():
    path, shape = "language/layers/k_proj/kernel", (3, 64, 32)
    assert spec(path, shape, mesh_of(tensor=2)) == P(None, None, "tensor")
    assert spec(path, shape, mesh_of(tensor=4)) == P(None, None, None)


def test_small_parameters_are_replicated():
    assert (
        sharding.parameter_spec("language/layers/q_proj/kernel", (2, 64, 64), mesh_of(fsdp=8), AXES)
        == P()
    )


def test_shardings_of_a_training_state():
    class Block(nnx.Module):
        def __init__(self):
            self.up_proj = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
            self.parts = nnx.List([nnx.Linear(32, 16, rngs=nnx.Rngs(1))])

    mesh = mesh_of(fsdp=4, tensor=2)
    params = nnx.state(Block())
    optimizer = optax.adamw(1e-3)
    for tree in (params, nnx.to_pure_dict(params)):
        places = sharding.shardings(tree, mesh, AXES, min_elements=0)
        kernels = {x.spec for x in jax.tree.leaves(places)}
        assert P("fsdp", "tensor") in kernels
        tree = jax.device_put(tree, places)
        moments = sharding.shardings(
            jax.eval_shape(optimizer.init, tree), mesh, AXES, min_elements=0
        )
        state = jax.jit(optimizer.init, out_shardings=moments)(tree)
        assert jax.tree.map(lambda x: x.sharding.spec, state[0].mu) == jax.tree.map(
            lambda x: x.sharding.spec, tree
        )
        assert state[0].count.sharding.is_fully_replicated


def test_sampling_gathers_all_but_tensor():
    mesh = mesh_of(fsdp=4, tensor=2)
    tree = {"language": {"q_proj": {"kernel": jnp.zeros((2048, 256))}, "norm": jnp.zeros(64)}}
    places = sharding.sampling_shardings(tree, mesh, AXES)
    assert places["language"]["q_proj"]["kernel"].spec == P(None, "tensor")
    assert places["language"]["norm"].is_fully_replicated
    whole = sharding.sampling_shardings(tree, mesh_of(fsdp=8), AXES)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(whole))


def test_one_device_cuts_nothing():
    for path, shape in [("language/layers/q_proj/kernel", (2, 64, 64)), ("x/kernel", (64, 64))]:
        assert not any(spec(path, shape, mesh_of()))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_batches_lie_over_data_and_fsdp(axes):
    mesh = mesh_of(**axes)
    rows = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    batch = sharding.global_batch({"x": rows, "id": np.arange(16)}, mesh)
    assert [s.data.shape for s in batch["x"].addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(batch["x"], rows)
    assert sharding.share(mesh) == Share()
    np.testing.assert_array_equal(sharding.own_rows(batch, mesh)["x"], rows)
    weights = jax.device_put(jnp.ones((3, 5)), sharding.replicated(mesh))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))))
    np.testing.assert_allclose(
        gradient(weights, batch["x"]), gradient(np.ones((3, 5)), rows), rtol=1e-5, atol=1e-6
    )


def test_rows_are_filled_up_to_equal_parts():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert [sharding.equal_parts(rows, mesh) for rows in (1, 4, 5)] == [4, 4, 8]


def test_a_process_reads_what_its_devices_hold(monkeypatch):
    """Wherever the mesh puts them; along `tensor` several processes may hold the same rows."""

    class Device:
        def __init__(self, process):
            self.process_index = process

    def share(processes, tensor, own):
        devices = np.array([Device(process) for process in processes]).reshape(1, -1, tensor)
        shape = dict(zip(sharding.AXES, devices.shape, strict=True))
        monkeypatch.setattr(jax, "process_index", lambda: own)
        return sharding.share(SimpleNamespace(devices=devices, shape=shape))

    assert [share((0, 0, 1, 1), 1, i) for i in range(2)] == [Share((0, 1), 4), Share((2, 3), 4)]
    assert [share((0, 1, 1, 0), 1, i) for i in range(2)] == [Share((0, 3), 4), Share((1, 2), 4)]
    four = [share((0, 1, 2, 3), 2, i) for i in range(4)]
    assert [x.parts for x in four] == [(0,), (0,), (1,), (1,)]
    assert [x.repeated for x in four] == [(), (0,), (), (1,)]
    assert [share((0, 1), 2, i) for i in range(2)] == [Share(), Share(repeated=(0,))]
    assert [share((0, 1, 1, 1), 2, i).repeated for i in range(2)] == [(), (0,)]
