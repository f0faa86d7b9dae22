"""Runs of several processes: who writes, who stops, and what happens when one dies."""

import dataclasses
import json
import signal
import time

import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax import config as configs
from lens_jax.commands import train
from lens_jax.distribution import processes
from lens_jax.training import metrics, run
from tests.launch import runs

STEPS = 40  # more than two processes get to
SHORT = {
    "alignment.steps": STEPS,
    "alignment.learning_rate": 1e-4,
    "alignment.batch_size": 4,
    "data.eval_limit": 5,
    "data.eval_batch_size": 4,
    "grpo.steps": 0,
    "precision": "float32",
    "checkpoint.every": 1,
    "distributed.heartbeat_timeout": 10,
}


@pytest.fixture
def start(checkpoint, data_dir, tmp_path):
    """Starts a run on two processes with two devices each."""
    address = f"localhost:{runs.free_port()}"

    def start(**flags):
        common = (
            SHORT | {"mesh.data": 2, "mesh.fsdp": 2, "distributed.coordinator": address} | flags
        )
        common |= {"distributed.processes": 2}
        places = (checkpoint, data_dir, tmp_path / "run")
        commands = [
            ("launch/train.py", *runs.arguments(*places, **common, **{"distributed.process_id": i}))
            for i in range(2)
        ]
        return runs.start(commands, tmp_path / "log", devices=2)

    return start


def wait_for_rows(directory, count, running):
    while len(metrics.read(directory)) < count:
        assert all(process.poll() is None for process in running), said(directory)
        time.sleep(0.05)


def said(directory):
    return [runs.log_of(directory.with_name("log"), i).read_text() for i in range(2)]


def test_all_are_started_with_the_same_configuration(monkeypatch):
    """But for which of them each is; a run would hang, or learn at two rates."""
    config = configs.load([])
    place = configs.DistributedConfig("host:1", 2, 1)
    gathered = []
    monkeypatch.setattr(processes, "gather", lambda mine: [*gathered, mine])
    run._agree(config)
    gathered += [{k: v for k, v in configs.leaves(config).items() if "distributed" not in k}]
    run._agree(dataclasses.replace(config, distributed=place))
    with pytest.raises(configs.ConfigError, match=r"process 1 .* than process 0 \(seed\)"):
        run._agree(dataclasses.replace(config, distributed=place, seed=config.seed + 1))


@pytest.mark.nightly
def test_two_processes_stop_together_and_end_with_each_other(start, checkpoint, data_dir, tmp_path):
    directory = tmp_path / "run"

    # A preemption notice to one of them stops both after the same step, with everything saved.
    running = start()
    wait_for_rows(directory, 2, running)
    running[1].send_signal(signal.SIGTERM)
    runs.finish(running, tmp_path / "log")
    rows = metrics.read(directory)
    store = checkpoints.TrainingCheckpoints(directory / "checkpoints" / "alignment", keep=2)
    assert store.latest() == len(rows) < STEPS
    assert "stopped after alignment step" in said(directory)[0]
    assert "stopped" not in said(directory)[1]  # one of them speaks for both
    scores = json.loads((directory / "evaluation.json").read_text())
    assert scores["before"]["samples"] == 5
    lines = (directory / "evaluation" / "before.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(5))
    assert len(list((directory / "samples").glob("*.png"))) == 2

    # So does Ctrl-C, with its own exit code for both.
    running = start()
    wait_for_rows(directory, len(rows) + 2, running)
    running[1].send_signal(signal.SIGINT)
    assert [process.wait(60) for process in running] == [130, 130], said(directory)
    rows = metrics.read(directory)
    assert store.latest() == len(rows) < STEPS

    # One dies: the other ends within a minute and says which one it was.
    running = start()
    wait_for_rows(directory, len(rows) + 2, running)
    running[1].kill()
    begin = time.monotonic()
    assert running[0].wait(60) != 0
    assert time.monotonic() - begin < 60
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in said(directory)[0]

    # One process alone goes on from there, to the end.
    done = store.latest()
    assert done >= len(rows)
    assert store.restore(done, {"position": 0}) == {"position": 4 * done}
    argv = runs.arguments(checkpoint, data_dir, directory, **SHORT)
    assert train.main(argv) == 0
    rows = metrics.read(directory)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert np.isfinite([row["loss"] for row in rows]).all()


@pytest.mark.nightly
def test_the_first_process_dies(start, tmp_path):
    """Nobody watches it: the others notice that it does not answer."""
    running = start()
    wait_for_rows(tmp_path / "run", 1, running)
    running[0].kill()
    begin = time.monotonic()
    assert running[1].wait(60) != 0
    assert time.monotonic() - begin < 60
    assert "leader task was preempted/died" in said(tmp_path / "run")[1]


@pytest.mark.nightly
def test_two_processes_train_both_stages_as_one_does(start, checkpoint, data_dir, tmp_path):
    """To the end: rollouts, final/, and the report."""
    both = {"alignment.steps": 1, "grpo.steps": 1, "grpo.batch_size": 4}
    runs.finish(start(**both), tmp_path / "log")
    flags = SHORT | both | {"mesh.data": 2, "mesh.fsdp": 2}
    argv = runs.arguments(checkpoint, data_dir, tmp_path / "alone", **flags)
    logs = tmp_path / "alone_log"
    runs.finish(runs.start([("launch/train.py", *argv)], logs, devices=4), logs)
    ours, alone = tmp_path / "run", tmp_path / "alone"
    assert (ours / "report.html").exists()
    for row, other in zip(metrics.read(ours), metrics.read(alone), strict=True):
        assert [name for name in row if row[name] is None] == [n for n in other if other[n] is None]
        for name in {n for n in other if other[n] is not None} - {"stage", *metrics.TIMINGS}:
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    pairs = zip(
        checkpoints.iterate_params(ours / "final"),
        checkpoints.iterate_params(alone / "final"),
        strict=True,
    )
    gap = size = 0.0
    for (name, value), (same_name, other) in pairs:
        assert name == same_name
        gap += np.square(value - other, dtype="f8").sum()
        size += np.square(other, dtype="f8").sum()
    assert gap**0.5 < 1e-5 * size**0.5
    scores, others = (json.loads((x / "evaluation.json").read_text()) for x in (ours, alone))
    for point, values in others.items():
        for name in values.keys() - {"dataset", "split", "seconds"}:
            assert scores[point][name] == pytest.approx(values[name], rel=1e-3), (point, name)
