"""metrics.jsonl: the promised keys, strict JSON, and rows that agree with the checkpoint."""

import json

import jax.numpy as jnp
import pytest

from lens_jax.config import ConfigError
from lens_jax.training import metrics, stages
from lens_jax.training.metrics import METRICS, RunError, StageLog


def rows_of(run_dir):
    return [(r["stage"], r["step"]) for r in metrics.read(run_dir)]


def write(run_dir, stage, first, last, steps=10):
    with StageLog(run_dir, stage, steps=steps, step=first - 1) as log:
        for step in range(first, last + 1):
            log.write(step, {"loss": step / 2})


def test_a_row_has_every_key_in_order(tmp_path):
    with StageLog(tmp_path, "grpo", steps=1) as log:
        log.write(
            1,
            {
                "reward": jnp.float32(0.5),
                "loss": float("nan"),
                "skipped_updates": jnp.int32(2),
                "reward/boundary": 0.25,
            },
        )
    text = (tmp_path / "metrics.jsonl").read_text()
    (line,) = text.splitlines()
    row = json.loads(line, parse_constant=pytest.fail)  # NaN is not JSON
    assert list(row) == ["stage", "step", *METRICS, "reward/boundary"]
    assert row["stage"] == "grpo" and row["step"] == 1
    assert row["reward"] == 0.5 and row["reward/boundary"] == 0.25
    assert row["loss"] is None and row["kl"] is None
    assert row["skipped_updates"] == 2 and isinstance(row["skipped_updates"], int)
    assert row["bad_samples"] is None


def test_rows_past_the_restored_step_are_cut(tmp_path):
    write(tmp_path, "alignment", 1, 3)
    write(tmp_path, "grpo", 1, 5)
    write(tmp_path, "grpo", 4, 4)  # restored at 3
    assert rows_of(tmp_path) == [
        *[("alignment", s) for s in (1, 2, 3)],
        *[("grpo", s) for s in (1, 2, 3, 4)],
    ]


def test_the_end_of_the_first_stage_again_leaves_the_second(tmp_path):
    """Its last checkpoint was damaged; the second goes on from its own."""
    write(tmp_path, "alignment", 1, 3)
    write(tmp_path, "grpo", 1, 2)
    write(tmp_path, "alignment", 3, 3)
    write(tmp_path, "grpo", 3, 3)
    stages = ("alignment", "grpo")
    assert rows_of(tmp_path) == [(stage, s) for stage in stages for s in (1, 2, 3)]


def test_a_stage_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
    """As with another checkpoint.directory; a kill before the first checkpoint is no such case."""
    write(tmp_path, "grpo", 1, 8)
    stages.refuse_to_forget(tmp_path, "grpo", "elsewhere", every=4)
    stages.refuse_to_forget(tmp_path, "alignment", "elsewhere", every=1)
    write(tmp_path, "grpo", 9, 9)
    with pytest.raises(ConfigError, match="has logged 9 steps of grpo, and elsewhere holds no"):
        stages.refuse_to_forget(tmp_path, "grpo", "elsewhere", every=4)


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"step": 1}', b'{"stage": "grpo"}', b"\xff"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    write(tmp_path, "grpo", 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 3: it is no row"):
        metrics.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"before": 3}', b"\xff"])
def test_scores_that_cannot_be_read_are_named(tmp_path, content):
    file = tmp_path / "evaluation.json"
    assert metrics.read_scores(file) == {}
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"evaluation\.json .*: remove it, to evaluate again"):
        metrics.read_scores(file)


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, "alignment", 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"stage": "alignment", "st')
    assert rows_of(tmp_path) == [("alignment", 1), ("alignment", 2)]
    write(tmp_path, "alignment", 3, 3)
    assert rows_of(tmp_path) == [("alignment", s) for s in (1, 2, 3)]


def test_tensorboard_holds_the_same(tmp_path):
    with StageLog(tmp_path, "grpo", steps=2) as log:
        log.write(1, {"reward/box": 0.75})
    (events,) = (tmp_path / "tensorboard" / "grpo").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert b"reward/box" in events.read_bytes()


def test_a_full_disk_stops_nobody(tmp_path, caplog, monkeypatch):
    """What it refuses is kept, and written when there is room; TensorBoard is let go."""
    monkeypatch.setattr(metrics, "FLUSH_SECONDS", 0)
    with StageLog(tmp_path, "grpo", steps=3) as log:
        log.write(1, {"reward": 0.5})
        rows, events = log._rows, log._events
        log._rows = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        events._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
        for step in (2, 3):
            log.write(step, {"reward": 0.5})
        log._rows = rows
    assert rows_of(tmp_path) == [("grpo", 1), ("grpo", 2), ("grpo", 3)]
    assert (
        caplog.text.count("/dev/full: [Errno 28] No space left on device. Its rows are kept") == 1
    )
    assert "lost" not in caplog.text
    with StageLog(tmp_path, "grpo", steps=9, step=5):  # of a checkpoint that was elsewhere
        assert "rows 4 to 5 of grpo are lost" in caplog.text
    assert caplog.text.count("TensorBoard is told no more of grpo: [Errno 28] No space") == 1


def test_a_disk_that_is_full_at_the_end_stops_nobody(tmp_path, caplog):
    """As NFS may say only then."""
    with StageLog(tmp_path, "grpo", steps=1) as log:
        log.write(1, {"reward": 0.5})
        log._events._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
        log.write(2, {"reward": 0.5})
    assert rows_of(tmp_path) == [("grpo", 1), ("grpo", 2)]
    assert "grpo: the end of its log may be lost: [Errno 28]" in caplog.text


def test_the_bar_shows_what_matters(tmp_path, capsys):
    with StageLog(tmp_path, "grpo", steps=4, step=1) as log:
        log.write(
            2, {"reward": 1.2345, "box_iou": 0.5, "mask_iou": 0.75, "tokens_per_second": 812.4}
        )
    bar = capsys.readouterr().err
    assert "GRPO (stage 2)" in bar and "2/4" in bar
    assert "reward 1.234, box IoU 0.500, mask IoU 0.750, tokens/s 812" in bar
