"""A whole run on random weights: what it writes, what it refuses, and that resuming is exact."""

import errno
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from lens_jax import checkpoints, config
from lens_jax.commands import train
from lens_jax.training import metrics, run_directory, scoring, stages
from tests.launch import runs
from tests.launch.runs import arguments
from tools import export_checkpoint, kill_test


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


def test_a_checkpoint_becomes_a_pretrained_directory(whole, tmp_path, capsys):
    """The last one is the trained model; one of stage 1 holds what stage 2 began with."""
    final = dict(checkpoints.iterate_params(whole / "final"))
    for stage, step in (("grpo", "last"), ("alignment", "2")):
        flags = ["--run_dir", whole, "--output", tmp_path / stage, "--stage", stage, "--step", step]
        assert export_checkpoint.main([str(flag) for flag in flags]) == 0
        assert checkpoints.read_config(tmp_path / stage) == checkpoints.read_config(whole / "final")
        exported = dict(checkpoints.iterate_params(tmp_path / stage))
        assert exported.keys() == final.keys()
        same = {name for name in final if np.array_equal(exported[name], final[name])}
        assert (same == final.keys()) == (stage == "grpo")
    flags = ["--run_dir", whole, "--output", tmp_path / "best", "--step", "best"]
    flags += ["--stage", "alignment"]  # which has no reward
    assert export_checkpoint.main([str(flag) for flag in flags]) == 2
    assert "holds no best checkpoint" in capsys.readouterr().err


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


def test_a_stopped_run_goes_on_exactly(whole, checkpoint, data_dir, tmp_path, monkeypatch, capfd):
    """Stopped in an evaluation, and after the first step of each stage, by the signal that
    clusters send and by Ctrl-C."""
    directory = tmp_path / "stopped"
    write, evaluate = metrics.StageLog.write, scoring.evaluate

    def evaluate_and_stop(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    monkeypatch.setattr(scoring, "evaluate", evaluate_and_stop)
    assert train.main(arguments(checkpoint, data_dir, directory)) == 0
    assert not (directory / "evaluation.json").exists() and not metrics.read(directory)
    monkeypatch.setattr(scoring, "evaluate", evaluate)

    sent = {"alignment": (signal.SIGTERM, 0, 2), "grpo": (signal.SIGINT, 130, 3)}

    def write_and_stop(self, step, values):
        if step == 1:
            os.kill(os.getpid(), sent[self.stage][0])
        return write(self, step, values)

    capfd.readouterr()
    for stage, (_, code, steps) in sent.items():
        monkeypatch.setattr(metrics.StageLog, "write", write_and_stop)
        assert train.main(arguments(checkpoint, data_dir, directory)) == code
        assert metrics.read(directory)[-1]["stage"] == stage
        assert not (directory / "final").exists()
        place = directory / "checkpoints" / stage / "1"
        out, err = capfd.readouterr()
        stop = f"stopped after {stage} step 1 of {steps}; saved in {place}, where the same command"
        assert out.splitlines()[-1].startswith(stop)
        assert ("stopping after this step; Ctrl-C" in err) == (code == 130)
        assert "Traceback" not in err
    # A row that a killed process wrote after its last checkpoint is written anew.
    (directory / "metrics.jsonl").open("a").write('{"stage": "grpo", "step": 2}\n')
    monkeypatch.setattr(metrics.StageLog, "write", write)
    replaced, vacate = [], stages.vacate
    monkeypatch.setattr(stages, "vacate", lambda state: [replaced.append(state), vacate(state)][1])
    assert train.main(arguments(checkpoint, data_dir, directory)) == 0
    goes_on = f"{directory}: goes on at grpo step 1 of 3, from {place}"
    assert [x for x in capfd.readouterr().out.splitlines() if "goes on" in x] == [goes_on]
    # The state that each stage had begun with does not lie beside the restored one.
    assert len(replaced) == 2 and all(x.is_deleted() for x in jax.tree.leaves(replaced))

    assert kill_test.compare(whole, directory) == []


# Every day test_a_stopped_run_goes_on_exactly.
@pytest.mark.nightly
def test_a_killed_run_goes_on_exactly(whole, checkpoint, data_dir, tmp_path, monkeypatch):
    """SIGKILL while a checkpoint is written, and between two: the short form of the tool."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    victim = kill_test.Victim(tmp_path / "run", arguments(checkpoint, data_dir, "")[2:])
    kills = [victim.kill("save", 1, 0.01), victim.kill("step", 2, 0.0)]
    assert None not in kills, victim.directory.with_suffix(".log").read_text()
    assert all(kill.step - kill.saved <= 2 for kill in kills)
    assert train.main(arguments(checkpoint, data_dir, tmp_path / "run")) == 0
    assert kill_test.compare(whole, tmp_path / "run") == []
    # It would say so.
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(rows.replace('"loss": ', '"loss": 1', 1))
    assert kill_test.compare(whole, tmp_path / "run") == ["metrics.jsonl: alignment step 1"]


STAGE_1 = {"alignment.warmup_steps": 0, "grpo.steps": 0}


def test_updates_that_are_never_finite_stop_the_run(checkpoint, data_dir, tmp_path, capfd, caplog):
    """A learning rate that breaks the weights in the first step."""
    flags = STAGE_1 | {"alignment.steps": 9, "alignment.learning_rate": 1e30, "max_skipped": 3}
    flags |= {"alignment.schedule": "linear"}
    argv = arguments(checkpoint, data_dir, tmp_path, **flags, **{"checkpoint.every": 9})
    assert train.main(argv) == 2
    rows = metrics.read(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 2, 3]
    first, *others = [row["learning_rate"] for row in rows]
    assert others == [pytest.approx(first * 8 / 9)] * 3  # what is left out is no step of it
    assert "step 2 is left out: loss or gradient is not finite; sample ids [2, 3]" in caplog.text
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("lens-jax: "))
    assert line.endswith(f"configs/tiny.yaml · {tmp_path} · float32")
    assert "error: alignment step 4: loss or gradient was not finite 3 times in a row" in err
    # What was saved is what the last good update left; whoever goes on has as many tries.
    store = checkpoints.TrainingCheckpoints(tmp_path / "checkpoints" / "alignment", keep=2)
    assert store.steps() == [4] and store.latest() == 4
    assert all(np.isfinite(value).all() for value in store.params(4).values())
    assert train.main(argv) == 2
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 8))


def test_a_full_disk(checkpoint, data_dir, tmp_path, monkeypatch, capfd, caplog):
    """A checkpoint on the way may fail; without its last one a stage does not end."""
    write, full = checkpoints.write_manifest, {"1", "3"}

    def write_manifest(directory, *score):
        if directory.name in full:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))
        write(directory, *score)

    monkeypatch.setattr(checkpoints.training, "write_manifest", write_manifest)
    flags = STAGE_1 | {"alignment.steps": 3, "alignment.schedule": "constant"}
    argv = arguments(checkpoint, data_dir, tmp_path, **flags)
    assert train.main(argv) == 2
    assert "alignment/1 could not be written, there is none yet" in caplog.text
    assert "No space left on device" in caplog.text and "Training goes on." in caplog.text
    err = capfd.readouterr().err
    assert "alignment/3 could not be written, the last one is" in err and "alignment/2" in err
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    full.clear()
    assert train.main(argv) == 0

    # Nothing depends on how many steps there are: the finished run is trained longer.
    shorter = dict(checkpoints.iterate_params(tmp_path / "final"))
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    flags |= {"alignment.steps": 4}
    assert train.main(arguments(checkpoint, data_dir, tmp_path, **flags)) == 0
    assert "goes on at alignment step 3 of 4" in capfd.readouterr().out
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4]
    longer = dict(checkpoints.iterate_params(tmp_path / "final"))
    assert any(not np.array_equal(longer[name], shorter[name]) for name in longer)
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again.keys() == scores.keys() and again["before"] == scores["before"]
    assert again["after_alignment"] != scores["after_alignment"]
    assert (tmp_path / "report.html").exists()


def test_the_disk_is_full(checkpoint, data_dir, tmp_path, monkeypatch, refused):
    """Elsewhere than in a checkpoint: one line, with the file and what to do."""

    def write(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_text", write)
    said = refused(train.main, *arguments(checkpoint, data_dir, tmp_path / "run"))
    assert f"error: {tmp_path / 'run' / 'config.yaml'}: the disk is full: make room" in said
    assert "then give the same command again; nothing had been trained" in said


def test_ctrl_c_before_the_first_step(checkpoint, data_dir, tmp_path):
    """Of a real process, wherever it is; one line, and nothing that the next start trips over."""
    run, logs = tmp_path / "run", tmp_path / "log"
    command = ("launch/train.py", *arguments(checkpoint, data_dir, run))
    (process,) = runs.start([command], logs, devices=1)
    try:
        while not (run / "config.yaml").exists():
            assert process.poll() is None, runs.log_of(logs, 0).read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    lines = runs.log_of(logs, 0).read_text().splitlines()
    assert lines[-1].startswith("stopped: nothing had been trained")
    assert not any("Traceback" in line or "Interrupt" in line for line in lines), lines


def test_finished_run(whole, checkpoint, data_dir, capfd, refused):
    assert train.main(arguments(checkpoint, data_dir, whole)) == 0
    assert "is finished" in capfd.readouterr().out
    said = refused(train.main, *arguments(checkpoint, data_dir, whole, **{"grpo.steps": 9}))
    assert f"To train longer, start from {whole / 'final'}: --model.checkpoint" in said
    assert (whole / "report.html").exists() and (whole / "final").exists()


def test_another_configuration_is_refused(whole, checkpoint, data_dir, refused):
    argv = arguments(checkpoint, data_dir, whole, **{"grpo.learning_rate": 0.5})
    assert "grpo.learning_rate" in refused(lambda a: train.main(a), *argv)
    assert "resume" in refused(
        lambda a: train.main(a), *arguments(checkpoint, data_dir, whole, resume="never")
    )


def test_a_refused_start_leaves_nothing(checkpoint, data_dir, tmp_path, refused):
    """And the command put right is no other run."""
    run = tmp_path / "runs" / "run"
    (tmp_path / "other").mkdir()
    for weights, flags, says in [
        (tmp_path / "nothing", {}, "nothing is not a directory"),
        (tmp_path / "other", {}, "holds no lens_config.json"),
        (checkpoint, {"attention": "splash"}, "attention: splash runs on TPU, not on cpu"),
        (checkpoint, {"mesh.data": 999}, "mesh.data 999"),
        (checkpoint, {"data.data_dir": tmp_path / "no_data"}, "no_data"),
        (checkpoint, {"data.eval_split": "vall"}, "vall"),
        (checkpoint, {"data.data_dir": data_dir, "data.shapes.train_scenes": 9}, "other scenes"),
    ]:
        assert says in refused(train.main, *arguments(weights, data_dir, run, **flags))
        assert not run.parent.exists()
    for flag, folder in (("mllm", "sam2"), ("sam", "nothing")):
        argv = ["--run_dir", run, f"--model.{flag}", f"checkpoints/tiny/{folder}"]
        assert folder in refused(train.main, *argv)
        assert not run.parent.exists()


def test_a_directory_in_which_another_process_trains(checkpoint, data_dir, tmp_path, refused):
    """It is left as it is; and free again once that process has ended."""
    argv = arguments(checkpoint, data_dir, tmp_path)
    with run_directory.locked(tmp_path):
        assert "another process is training in" in refused(train.main, *argv)
    assert not list(tmp_path.iterdir())
    with run_directory.locked(tmp_path):
        pass


def test_begun_anew_before_the_first_update(tmp_path):
    """With other flags: what they replace is removed, and what a step has trained is not."""
    old, new = (config.RunConfig(run_dir=str(tmp_path), seed=seed) for seed in (1, 2))
    run_directory.claim(tmp_path, old, run_directory.inspect(tmp_path, old))
    (tmp_path / "start").mkdir()
    (tmp_path / "evaluation.json").write_text('{"before": {"giou": 1}}')
    found = run_directory.inspect(tmp_path, new)
    assert found == {"finished": False, "begun": False, "changed": ["seed"], "reconvert": True}
    assert (tmp_path / "start").exists()
    run_directory.claim(tmp_path, new, found)
    assert not (tmp_path / "start").exists() and not (tmp_path / "evaluation.json").exists()
    assert config.read_yaml(tmp_path / "config.yaml") == new
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics.row("alignment", 1, {})) + "\n")
    with pytest.raises(config.ConfigError, match=r"another configuration \(seed\)"):
        run_directory.inspect(tmp_path, old)
