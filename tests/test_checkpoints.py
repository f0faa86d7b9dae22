"""What is written is read back; what is damaged is named and not used."""

import errno
import resource
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fsspec.implementations.local import LocalFileSystem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax import checkpoints
from lens_jax.checkpoints import CheckpointError, TrainingCheckpoints

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def state_at(step):
    parameters = {"w": jnp.full((8, 4), step, jnp.float32), "layers": [jnp.ones(3, jnp.bfloat16)]}
    return {
        "parameters": parameters,
        "optimizer": OPTIMIZER.init(parameters),
        "key": jax.random.key(step),
        "step": step,
        "position": 32 * step,
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if checkpoints.training._is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


@pytest.fixture
def stage(tmp_path):
    return TrainingCheckpoints(tmp_path / "checkpoints" / "grpo", keep=2)


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# What can happen to a file, and what is said about it.
DAMAGES = {
    "a byte flipped": (flip_a_byte, "the content of {} is not"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-1]), "{} has "),
    "deleted": (lambda file: file.unlink(), "{} is missing"),
}


def files_of(directory):
    """Relative path -> file, manifest apart."""
    directory = Path(directory)
    files = (f for f in directory.rglob("*") if f.is_file() and f.name != checkpoints.MANIFEST)
    return {f.relative_to(directory).as_posix(): f for f in files if f.stat().st_size}


# --- training -------------------------------------------------------------------------------------


def test_restores_what_was_saved(stage):
    assert stage.latest() is None
    stage.save(10, state_at(10))
    assert stage.latest() == 10
    restored = stage.restore(10, state_at(0))
    assert_same(restored, state_at(10))
    assert restored["position"] == 320
    assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(jax.random.key(0))


def test_keeps_the_last_n(stage):
    for step in (1, 2, 3, 4):
        stage.save(step, state_at(step))
    stage.wait()
    assert stage.steps() == [3, 4]


def test_keeps_the_best_besides(tmp_path):
    stage = TrainingCheckpoints(tmp_path, keep=1, keep_best=2)
    for step, score in enumerate((0.3, 0.9, None, 0.5, 0.5, 0.1), start=1):
        stage.save(step, state_at(step), score)
    stage.wait()
    # 4 and 5 are equally good: the later one stays.
    assert stage.steps() == [2, 5, 6]
    assert stage.best() == 2
    again = TrainingCheckpoints(tmp_path, keep=1, keep_best=2)
    again.save(7, state_at(7), 0.7)
    again.wait()
    assert again.steps() == [2, 7]
    assert TrainingCheckpoints(tmp_path / "none", keep=1).best() is None


def test_keeps_milestones(tmp_path):
    stage = TrainingCheckpoints(tmp_path, keep=1, milestones=[2])
    for step in (1, 2, 3, 4):
        stage.save(step, state_at(step))
    stage.wait()
    assert stage.steps() == [2, 4]


def test_buffers_may_be_donated_at_once(stage):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"w": jnp.arange(2.0**20)}
    expected = np.array(tree["w"])
    stage.save(1, tree)
    for _ in range(20):
        tree = update(tree)
    stage.wait()
    np.testing.assert_array_equal(stage.restore(1, {"w": expected})["w"], expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(stage, caplog, damage):
    stage.save(1, state_at(1))
    stage.save(2, state_at(2))
    stage.wait()
    hurt, words = DAMAGES[damage]
    files = files_of(stage.directory / "2")
    assert len(files) > 3
    for name, file in files.items():
        intact = file.read_bytes()
        hurt(file)
        caplog.clear()
        assert stage.latest() == 1
        assert f"grpo/2 is left out: {words.format(name)}" in caplog.text
        file.write_bytes(intact)
    assert stage.latest() == 2
    manifest = stage.directory / "2" / checkpoints.MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"sha256": "', b'"sha256": "0', 1))
    assert stage.latest() == 1
    assert_same(stage.restore(1, state_at(0)), state_at(1))


@pytest.mark.parametrize("what", ["no manifest", "broken manifest", "empty manifest"])
def test_a_half_written_checkpoint_is_passed_over(stage, what, caplog):
    stage.save(1, state_at(1))
    stage.save(2, state_at(2))
    stage.wait()
    manifest = stage.directory / "2" / checkpoints.MANIFEST
    if what == "no manifest":
        manifest.unlink()
    elif what == "broken manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.write_text('{"files": {}}')
    assert stage.latest() == 1
    assert "manifest" in caplog.text


def test_an_unreadable_checkpoint_is_passed_over(stage, monkeypatch, caplog):
    """As on a disk or a network that fails: it says so and names the file."""
    stage.save(1, state_at(1))
    stage.save(2, state_at(2))
    stage.wait()
    read = checkpoints.manifest._sha256

    def failing(file):
        if "/2/" in str(file):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(checkpoints.manifest, "_sha256", failing)
    assert stage.latest() == 1
    assert "grpo/2 is left out: it cannot be read: [Errno 5] Input/output error: " in caplog.text


def test_nothing_begins_anew_over_damaged_checkpoints(stage):
    stage.save(1, state_at(1))
    stage.wait()
    flip_a_byte(max(files_of(stage.directory / "1").values()))
    with pytest.raises(CheckpointError, match="grpo: every checkpoint there is damaged"):
        stage.latest()
    (stage.directory / "1" / checkpoints.MANIFEST).unlink()  # not written to its end: lost steps
    assert stage.latest() is None


def test_what_killed_saves_have_left_goes_with_the_next(stage):
    """A kill between the arrays and the manifest leaves a whole checkpoint's bytes."""
    for step in (10, 13):
        stage.save(step, state_at(step))
    stage.wait()
    (stage.directory / "13" / checkpoints.MANIFEST).unlink()
    assert stage.latest() == 10
    stage.save(20, state_at(20))
    stage.wait()
    assert stage.steps() == [10, 20]


def test_nothing_is_removed_while_a_manifest_cannot_be_read(stage, caplog):
    """It may belong to the best checkpoint, or to the last good one."""
    stage.save(1, state_at(1))
    stage.wait()
    manifest = stage.directory / "1" / checkpoints.MANIFEST
    manifest.unlink()
    manifest.mkdir()
    for step in (2, 3, 4):
        stage.save(step, state_at(step))
    stage.wait()
    assert stage.steps() == [1, 2, 3, 4]
    assert "not needed any more stay: [Errno 21] Is a directory" in caplog.text


def test_saving_an_earlier_step_leaves_the_abandoned_course(stage):
    stage.save(20, state_at(20))
    stage.save(30, state_at(30))
    stage.wait()
    flip_a_byte(max(files_of(stage.directory / "30").values()))
    assert stage.latest() == 20
    stage.save(25, state_at(25))  # must not lose a slot to the damaged 30
    stage.wait()
    assert stage.steps() == [20, 25]
    stage.save(25, state_at(26))
    assert stage.latest() == 25
    assert stage.restore(25, {"step": 0}) == {"step": 26}


def test_leftovers_of_a_killed_save_do_no_harm(stage):
    (stage.directory / "7.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert stage.latest() is None
    stage.save(7, state_at(7))
    assert stage.latest() == 7


def test_restores_a_part_and_onto_a_mesh(stage):
    stage.save(3, state_at(3))
    assert stage.latest() == 3
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, P("data"))
    like = {"parameters": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place)}}
    w = stage.restore(3, like)["parameters"]["w"]
    assert w.sharding == place
    np.testing.assert_array_equal(w, np.full((8, 4), 3))
    stage.save(4, {"w": w})  # and a sharded array is saved whole
    stage.wait()
    np.testing.assert_array_equal(stage.restore(4, {"w": np.empty((8, 4), np.float32)})["w"], w)


def test_what_does_not_fit_is_named(stage):
    stage.save(3, state_at(3))
    stage.wait()
    with pytest.raises(CheckpointError, match="parameters/v"):
        stage.restore(3, {"parameters": {"v": jnp.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"parameters/w has shape \(8, 4\).*\(8, 5\)"):
        stage.restore(3, {"parameters": {"w": jnp.zeros((8, 5))}})
    with pytest.raises(CheckpointError, match="4 is not a checkpoint"):
        stage.restore(4, state_at(0))


def test_a_failed_save_is_not_silent(stage):
    stage.directory.parent.mkdir(parents=True)
    stage.directory.write_text("in the way")
    with pytest.raises(CheckpointError, match="grpo/1 could not be written, there is none yet: "):
        stage.save(1, state_at(1))


def test_a_full_disk_keeps_the_last_good_checkpoint(stage):
    """A limit on the size of files stands for it: to the writer both are an error of the disk."""
    state = {"w": np.random.default_rng(0).random(2**18), "step": 1}
    stage.save(1, state)
    stage.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        stage.save(2, state | {"step": 2})
        with pytest.raises(CheckpointError, match=r"grpo/2 could not be .*, the last one is .*/1:"):
            stage.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in stage.directory.iterdir()] == ["1"]
    assert stage.latest() == 1
    stage.save(3, state | {"step": 3})  # and there may be room again
    assert stage.latest() == 3
    assert stage.restore(3, {"step": 0}) == {"step": 3}


def test_remote_directories_go_through_the_same_code(tmp_path, monkeypatch, caplog):
    """A bucket that is a local directory; the arrays themselves are written by tensorstore."""

    class Bucket(LocalFileSystem):
        protocol = "gs"

        def __init__(self, **_):
            super().__init__(auto_mkdir=True)

        @classmethod
        def _strip_protocol(cls, path):
            inner = str(path).removeprefix("gs://").removeprefix(f"{tmp_path}/")
            return f"{tmp_path}/{inner}"

    class Written:
        def __init__(self, target, leaves):
            for name in leaves:
                (target / "arrays").mkdir(parents=True, exist_ok=True)
                (target / "arrays" / name).write_text(name * 100)

        def result(self):
            pass

    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, Bucket, clobber=True)
    monkeypatch.setattr(checkpoints.training.ocp, "save_async", Written)
    stage = TrainingCheckpoints("gs://bucket/run/grpo", keep=2)
    for step in (1, 2, 3):
        stage.save(step, {"w": np.ones(3), "step": step})
    stage.wait()
    assert str(stage.directory / "3") == "gs://bucket/run/grpo/3"
    assert stage.steps() == [2, 3] and stage.latest() == 3
    assert {p.name for p in (tmp_path / "bucket/run/grpo").iterdir()} == {"2", "3"}
    flip_a_byte(tmp_path / "bucket/run/grpo/3/arrays/w")
    assert stage.latest() == 2
    assert "gs://bucket/run/grpo/3 is left out: the content of arrays/w is not" in caplog.text


def test_a_store_without_its_library_names_it():
    with pytest.raises(CheckpointError, match=r"az://bucket/run cannot be reached: .*adlfs"):
        TrainingCheckpoints("az://bucket/run", keep=1)


# --- pretrained -----------------------------------------------------------------------------------


@pytest.fixture
def model():
    rng = np.random.default_rng(0)
    return {
        "visual": {"blocks": {"qkv": {"kernel": rng.normal(size=(12, 4, 6)).astype(np.float32)}}},
        "language": {
            "layers": {"norm": {"scale": rng.normal(size=(2, 4)).astype(jnp.bfloat16)}},
            "embed_tokens": {"embedding": rng.normal(size=(9, 4)).astype(np.float32)},
        },
        "context": {"blocks": {"fc1": {"bias": np.ones((3, 5), np.float32)}}},
        "sam": {"trunk": {"blocks": {0: {"w": np.arange(3)}, 1: {"w": np.arange(4)}}}},
    }


@pytest.fixture(
    params=[checkpoints.pretrained.PORTION_BYTES, 100], ids=["one portion", "many portions"]
)
def portions(request, monkeypatch):
    monkeypatch.setattr(checkpoints.pretrained, "PORTION_BYTES", request.param)


def test_unstack_gives_one_tensor_a_layer(model):
    flat = dict(checkpoints.unstack(model))
    assert len(flat) == 12 + 2 + 1 + 3 + 2
    np.testing.assert_array_equal(
        flat["visual/blocks/10/qkv/kernel"], model["visual"]["blocks"]["qkv"]["kernel"][10]
    )
    assert "sam/trunk/blocks/1/w" in flat
    assert_same(checkpoints.stack(flat), model)


def test_a_gap_in_the_layers_is_named(model):
    flat = dict(checkpoints.unstack(model))
    del flat["visual/blocks/4/qkv/kernel"]
    with pytest.raises(CheckpointError, match="visual/blocks/qkv/kernel: layer 4 is missing"):
        checkpoints.stack(flat)


def test_pretrained_round_trip(model, portions, tmp_path, monkeypatch):
    for name in ("tokenizer.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    config = {"coordinates": "qwen2p5vl", "prompt": "the “{question}”"}
    target = tmp_path / "new" / "final"
    checkpoints.save_pretrained(target, checkpoints.unstack(model), config, files_from=tmp_path)
    assert sorted(p.name for p in target.iterdir()) == [
        "generation_config.json",
        "lens_config.json",
        "manifest.json",
        "params",
        "tokenizer.json",
    ]
    assert [p.name for p in target.parent.iterdir()] == ["final"]
    read, loaded = checkpoints.load_pretrained(target)
    assert read == config == checkpoints.read_config(target)
    assert_same(loaded, model)
    flat = dict(checkpoints.unstack(model))
    monkeypatch.chdir(target.parent)
    streamed = dict(checkpoints.iterate_params("final"))  # relative paths and strings will do
    assert streamed.keys() == flat.keys()
    assert_same(streamed, flat)


def test_pretrained_in_another_dtype_and_on_a_mesh(model, portions, tmp_path):
    checkpoints.save_pretrained(tmp_path / "m", checkpoints.unstack(model), {})
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return NamedSharding(mesh, P(None, "fsdp") if len(shape) == 3 else P())

    _, loaded = checkpoints.load_pretrained(tmp_path / "m", dtype=jnp.bfloat16, sharding=place)
    kernel = loaded["visual"]["blocks"]["qkv"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding.spec == P(None, "fsdp")
    assert asked["visual/blocks/qkv/kernel"] == (12, 4, 6)
    np.testing.assert_array_equal(
        kernel, model["visual"]["blocks"]["qkv"]["kernel"].astype(jnp.bfloat16)
    )
    assert np.issubdtype(loaded["sam"]["trunk"]["blocks"][0]["w"].dtype, np.integer)


def test_writing_never_holds_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints.pretrained, "PORTION_BYTES", 1000)
    alive = set()

    class Tensor(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def tensors():
        for i in range(30):
            tensor = np.zeros(100, np.float32).view(Tensor)
            alive.add(id(tensor))
            assert len(alive) <= 6
            yield f"language/layers/{i}/w", tensor
            del tensor

    checkpoints.save_pretrained(tmp_path / "m", tensors(), {})


def test_nothing_is_left_of_a_failed_write(model, tmp_path):
    def breaks():
        yield "a", np.ones(3)
        raise OSError("the source is broken")

    with pytest.raises(OSError, match="the source is broken"):
        checkpoints.save_pretrained(tmp_path / "m", breaks(), {})
    with pytest.raises(CheckpointError, match="a is given twice"):
        checkpoints.save_pretrained(tmp_path / "m", [("a", np.ones(3)), ("a", np.ones(3))], {})
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(model, tmp_path):
    (tmp_path / "m").mkdir()
    checkpoints.save_pretrained(tmp_path / "m", checkpoints.unstack(model), {})
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.save_pretrained(tmp_path / "m", checkpoints.unstack(model), {})


def test_damage_and_absence_are_named(model, tmp_path):
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        checkpoints.load_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no lens_config\.json"):
        checkpoints.load_pretrained(tmp_path)
    checkpoints.save_pretrained(tmp_path / "m", checkpoints.unstack(model), {})
    for name, file in files_of(tmp_path / "m").items():
        intact = file.read_bytes()
        flip_a_byte(file)
        with pytest.raises(CheckpointError, match=name):
            checkpoints.load_pretrained(tmp_path / "m")
        file.write_bytes(intact)
    checkpoints.load_pretrained(tmp_path / "m")
