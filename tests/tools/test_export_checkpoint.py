"""tools/export_checkpoint: a run's saved parameters as a pretrained checkpoint, or why not."""

import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax.config import (
    AlignmentConfig,
    CheckpointConfig,
    GRPOConfig,
    ModelConfig,
    RunConfig,
    dump_yaml,
)
from tools import export_checkpoint

BEGINNING = {
    "context/queries": np.zeros((2, 4), np.float32),
    "language/layers/0/kernel": np.zeros((3, 3), np.float32),
    "language/layers/1/kernel": np.zeros((3, 3), np.float32),
    "sam/mask": np.zeros(5, np.float32),
}


def params(value, **changed):
    trained = {
        "context": {"queries": np.full((2, 4), value, np.float32)},
        "language": {"layers": {"kernel": np.full((2, 3, 3), value, np.float32)}},
    }
    return {"state": {"params": trained | changed}}


@pytest.fixture
def run(tmp_path):
    """A run that took two stages: a start, and the last checkpoint of each stage."""
    run_dir = tmp_path / "run"
    config = RunConfig(
        model=ModelConfig(mllm="a", sam="b"),
        alignment=AlignmentConfig(steps=4, trained=("context", "language")),
        grpo=GRPOConfig(steps=9),
        checkpoint=CheckpointConfig(every=3),
    )
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    checkpoints.save_pretrained(run_dir / "start", BEGINNING, {"context_positions": "mrope"})
    for stage, step, value in (("alignment", 4, 1.0), ("grpo", 3, 2.0), ("grpo", 6, 3.0)):
        save(run_dir, stage, step, params(value))
    return run_dir


def save(run_dir, stage, step, state):
    store = checkpoints.TrainingCheckpoints(run_dir / "checkpoints" / stage, keep=5)
    store.save(step, state, score=-step)
    store.wait()


def export(run_dir, output, **options):
    flags = {"run_dir": run_dir, "output": output} | options
    return export_checkpoint.main([f"--{name}={value}" for name, value in flags.items()])


@pytest.fixture
def refused(capsys):
    """The one line that a mistake comes to."""

    def call(*argv):
        capsys.readouterr()
        assert export_checkpoint.main([*argv]) == 2
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
        return line

    return call


@pytest.mark.parametrize(
    ("options", "value", "says"),
    [
        ({}, 3, "grpo step 6"),
        ({"step": 3}, 2, "grpo step 3"),
        ({"step": "best"}, 2, "grpo step 3"),
        ({"stage": "alignment"}, 1, "alignment step 4"),
    ],
)
def test_the_step_that_was_asked_for(run, tmp_path, capsys, options, value, says):
    assert export(run, tmp_path / "out", **options) == 0
    assert says in capsys.readouterr().out
    written = dict(checkpoints.iterate_params(tmp_path / "out"))
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in BEGINNING.items()}
    for name, x in written.items():
        assert (x == (0 if name == "sam/mask" else value)).all(), name


def test_mistakes_are_one_line(refused, run, tmp_path):
    def says(run_dir=run, **options):
        flags = {"run_dir": run_dir, "output": tmp_path / "out"} | options
        said = refused(*(f"--{k}={v}" for k, v in flags.items()))
        assert not (tmp_path / "out").exists()
        return said

    assert f"{tmp_path / 'none'}: no run is there" in says(tmp_path / "none")
    assert "no run is there, for it holds no config.yaml" in says(tmp_path)
    assert "holds no 5 checkpoint; kept are: 3, 6" in says(step=5)
    assert "or one of last, best, got first" in says(step="first")
    (run / "start" / "lens_config.json").rename(run / "kept")
    assert "start holds no lens_config.json" in says()
    (run / "start" / "lens_config.json").write_text("{")
    assert "lens_config.json is not JSON" in says()
    (run / "config.yaml").write_text("- 1\n")
    assert f"{run / 'config.yaml'}: no configuration can be read from it" in says()


def test_another_start_is_refused(refused, run, tmp_path):
    """Parameters that it does not have would be lost, and others written in a wrong shape."""
    wider = {"queries": np.ones((2, 5), np.float32)}
    deeper = {"layers": {"kernel": np.ones((3, 3, 3), np.float32)}}
    new = {"queries": np.ones((2, 4), np.float32), "new": np.ones(1, np.float32)}
    for step, changed in enumerate(({"context": wider}, {"language": deeper}, {"context": new})):
        save(run, "grpo", 7 + step, params(4.0, **changed))
        flags = (f"--run_dir={run}", f"--output={tmp_path / 'out'}")
        assert f"start is not what {run} began with" in refused(*flags)


def test_a_first_stage_that_is_lost_is_refused(refused, run, tmp_path):
    """Where the second one does not train the same."""
    (run / "checkpoints" / "alignment").rename(run / "away")
    assert export(run, tmp_path / "whole") == 0
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("- language\n  - context\n", "- language\n"))
    said = refused(f"--run_dir={run}", f"--output={tmp_path / 'out'}")
    assert "grpo goes on with what alignment trained (context)" in said
