"""Several processes compute what one does, and go on with each other's checkpoints."""

import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax.distribution import sharding
from tests.launch import runs
from tests.test_checkpoints import DAMAGES, files_of
from tests.training import stages, worker

pytestmark = pytest.mark.usefixtures("quick_compiler")


@pytest.fixture(autouse=True)
def every_parameter_is_cut(monkeypatch):
    """In this process too, and no longer than a test: the worker leaves it so."""
    monkeypatch.setitem(sharding.parameter_spec.__kwdefaults__, "min_elements", 0)


def run(folder, count, *resume):
    """The results of `count` processes, which share four devices."""
    address = f"localhost:{runs.free_port()}"
    commands = [
        ("-m", worker.__name__, str(folder), str(count), str(i), address, *resume)
        for i in range(count)
    ]
    logs = folder / f"log{count}"
    runs.finish(runs.start(commands, logs, devices=4 // count), logs)
    return [dict(np.load(folder / f"{count}.{i}.npz")) for i in range(count)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def count(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def several(folder, count):
    return run(folder, count)


def same(ours, theirs):
    """Whole numbers exactly, others by their norm, all parameters as one.

    A key's bias cancels in the softmax: its gradient is rounding, which Adam makes steps of.
    """
    assert ours.keys() == theirs.keys()
    gaps, norms = {}, {}
    for name, want in theirs.items():
        got = ours[name]
        if np.issubdtype(want.dtype, np.floating):
            tree = name.split("[")[0]
            gap, size = (np.square(x, dtype="f8").sum() for x in (got - want, want))
            gaps[tree], norms[tree] = gaps.get(tree, 0) + gap, norms.get(tree, 0) + size
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)
    for tree, gap in gaps.items():
        assert gap**0.5 <= 1e-5 * norms[tree] ** 0.5 + 1e-9, (tree, gap**0.5)


def test_every_process_ends_with_the_same(several):
    for other in several[1:]:
        assert several[0].keys() == other.keys()
        for name, value in several[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_several_processes_and_one_agree(several, tmp_path):
    """One update from fixed completions, and sampled completions."""
    same(several[0], worker.work(tmp_path, resume=False))


def test_damage_to_what_several_processes_wrote_is_seen(several, count, folder):
    directory = folder / "checkpoints" / "1"
    files = files_of(directory)
    assert all(any(f"process_{i}/" in name for name in files) for i in range(count))
    for name, file in files.items():
        intact = file.read_bytes()
        for hurt, words in DAMAGES.values():
            hurt(file)
            assert words.format(name) in checkpoints.check_manifest(directory)
            file.write_bytes(intact)
    assert checkpoints.check_manifest(directory) is None


def test_fewer_processes_go_on_where_several_stopped(several, count, folder):
    """One process after two; two, and one, after four. As the several themselves went on."""
    alone = worker.work(folder, resume=True)
    assert alone["position"] == stages.B and alone["state.step"] == 2
    went_on = {k.removeprefix("next/"): v for k, v in several[0].items() if k.startswith("next/")}
    same({name: alone[name] for name in went_on}, went_on)
    if count == 4:
        same(run(folder, 2, "resume")[0], alone)
