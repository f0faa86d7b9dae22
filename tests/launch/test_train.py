"""A whole run on random weights: what it writes, what it refuses, and that resuming is exact."""

import json
import os
import signal

import numpy as np
import pytest

from launch import train
from lens_jax import checkpoints
from lens_jax.training import metrics


def arguments(checkpoint, data_dir, run_dir, **more):
    flags = {
        "run_dir": run_dir,
        "model.checkpoint": checkpoint,
        "data.data_dir": data_dir,
        "data.shapes.train_scenes": 0,
        # Golden's tokenizer spells words out, and its windows are four times smaller.
        "data.prompt_tokens": "[256]",
        "data.windows": "[4]",
        "data.answer_tokens": "[96]",
        "data.eval_limit": 3,
        "data.eval_batch_size": 2,
        "samples": 2,
        "alignment.steps": 2,
        "alignment.batch_size": 2,
        "grpo.steps": 3,
        "grpo.batch_size": 2,
        "grpo.num_generations": 2,
        "rollout.max_new_tokens": 8,
        "checkpoint.every": 1,
        "mesh.data": 1,
        "remat": "full",
    } | more
    return [str(x) for key, value in flags.items() for x in (f"--{key}", value)]


@pytest.fixture(scope="module")
def whole(checkpoint, data_dir, tmp_path_factory):
    """A run from start to end."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(arguments(checkpoint, data_dir, directory)) == 0
    return directory


def test_run_directory(whole):
    rows = metrics.read(whole)
    assert [(r["stage"], r["step"]) for r in rows] == [
        *(("alignment", i) for i in (1, 2)),
        *(("grpo", i) for i in (1, 2, 3)),
    ]
    for row in rows:
        assert set(metrics.METRICS) <= set(row)
        assert row["loss"] is not None and row["grad_norm"] > 0
    assert all(r["reward"] is None for r in rows[:2])
    for row in rows[2:]:
        assert None not in [row[name] for name in metrics.METRICS], row
        assert row["rollout_gap"] < 1e-4
        assert row["skipped_updates"] == row["bad_samples"] == 0
    # All batches are of one shape: each stage compiles in its first step, and never again.
    assert [r["compilations"] > 0 for r in rows] == [True, False, True, False, False]
    scores = json.loads((whole / "evaluation.json").read_text())
    assert list(scores) == ["before", "after_alignment", "after_grpo"]
    assert all(s["samples"] == 3 for s in scores.values())
    assert len(list((whole / "samples").glob("*.png"))) == 2
    assert (whole / "report.html").stat().st_size > 1000
    assert len(list((whole / "tensorboard").rglob("events*"))) == 2


def test_stages_train_what_they_should(whole, checkpoint):
    before = dict(checkpoints.iterate_params(checkpoint))
    after = dict(checkpoints.iterate_params(whole / "final"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.split("/")[0] for name in moved} == {"visual", "language", "context", "sam"}
    for name in before:
        if name.startswith(("unused/", "sam/image_encoder/", "sam/no_mem_embed")):
            assert name not in moved


def test_options_of_stage_2(checkpoint, data_dir, tmp_path):
    """Sampling stays with the first policy while the trained part of it moves away."""
    options = {
        "alignment.steps": 0,
        "grpo.trained": "[language, sam_decoder]",
        "grpo.learning_rate": 0.01,
        "grpo.beta": 0,
        "rollout.policy": "base",
        "rollout.temperature": 0.9,
        "rollout.final_temperature": 0.3,
        "rewards.squared": "[segment]",
    }
    assert train.main(arguments(checkpoint, data_dir, tmp_path / "run", **options)) == 0
    rows = metrics.read(tmp_path / "run")
    np.testing.assert_allclose([row["temperature"] for row in rows], [0.9, 0.6, 0.3], rtol=1e-6)
    assert rows[0]["rollout_gap"] < 1e-4 < 1e-2 < rows[1]["rollout_gap"]
    assert all(row["kl"] == 0 for row in rows)
    before = dict(checkpoints.iterate_params(checkpoint))
    after = checkpoints.iterate_params(tmp_path / "run" / "final")
    moved = {name for name, value in after if not np.array_equal(before[name], value)}
    assert {"/".join(name.split("/")[: 1 + name.startswith("sam")]) for name in moved} <= {
        "language",
        "sam/sam_mask_decoder",
        "sam/sam_prompt_encoder",
    }
    assert any(name.startswith("language/") for name in moved)


def test_a_stopped_run_goes_on_exactly(whole, checkpoint, data_dir, tmp_path, monkeypatch):
    """Stopped after the first step of each stage by the signal that clusters send."""
    directory = tmp_path / "stopped"
    write = metrics.StageLog.write

    def write_and_stop(self, step, values):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(self, step, values)

    for stage in ("alignment", "grpo"):
        monkeypatch.setattr(metrics.StageLog, "write", write_and_stop)
        assert train.main(arguments(checkpoint, data_dir, directory)) == 0
        assert metrics.read(directory)[-1]["stage"] == stage
        assert not (directory / "final").exists()
    # A row that a killed process wrote after its last checkpoint is written anew.
    (directory / "metrics.jsonl").open("a").write('{"stage": "grpo", "step": 2}\n')
    monkeypatch.setattr(metrics.StageLog, "write", write)
    assert train.main(arguments(checkpoint, data_dir, directory)) == 0

    changing = {
        *("relayout_seconds", "rollout_seconds", "update_seconds", "tokens_per_second"),
        "compilations",
    }
    kept = [
        [{k: v for k, v in row.items() if k not in changing} for row in metrics.read(run)]
        for run in (whole, directory)
    ]
    assert kept[0] == kept[1]
    ours, theirs = (dict(checkpoints.iterate_params(r / "final")) for r in (directory, whole))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_finished_run(whole, checkpoint, data_dir, capsys):
    assert train.main(arguments(checkpoint, data_dir, whole)) == 0
    assert "is finished" in capsys.readouterr().out


def test_another_configuration_is_refused(whole, checkpoint, data_dir, refused):
    argv = arguments(checkpoint, data_dir, whole, **{"grpo.learning_rate": 0.5})
    assert "grpo.learning_rate" in refused(lambda a: train.main(a), *argv)
    assert "resume" in refused(
        lambda a: train.main(a), *arguments(checkpoint, data_dir, whole, resume="never")
    )


def test_missing_checkpoint(data_dir, tmp_path, refused):
    argv = arguments(tmp_path / "nothing", data_dir, tmp_path / "run")
    assert "nothing" in refused(lambda a: train.main(a), *argv)


def test_a_kernel_of_another_platform(checkpoint, data_dir, tmp_path, refused):
    argv = arguments(checkpoint, data_dir, tmp_path / "run", attention="splash")
    assert "attention: splash runs on TPU, not on cpu" in refused(lambda a: train.main(a), *argv)
