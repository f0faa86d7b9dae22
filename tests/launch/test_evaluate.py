"""launch/evaluate.py: scores, rows, mistakes."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest

from lens_jax import evaluation
from lens_jax.commands import evaluate
from lens_jax.data import images
from lens_jax.data.sample import SampleError
from lens_jax.inference import Lens
from lens_jax.reports import evaluation_page

KEYS = {
    "dataset", "split", "samples", "ciou", "giou", "box_iou", "precision_at_0.5", "format_rate",
    "seconds",
}  # fmt: skip


def call(*argv) -> int:
    return evaluate.main([str(a) for a in (*argv, "--devices", 1)])


@pytest.fixture
def asked(checkpoint, data_dir):
    return ("--checkpoint", checkpoint, "--dataset", "refcoco", "--data_dir", data_dir)


@pytest.mark.parametrize("flags", [(), ("--reasoning", "true", "--official_masks", "true")])
def test_scores_rows_and_table(asked, tmp_path, capsys, flags):
    """Five expressions by three: the copies that fill the last batch are not counted."""
    scores_file, rows_file = tmp_path / "new" / "scores.json", tmp_path / "rows.jsonl"
    size = ("--limit", 5, "--batch_size", 3)
    files = ("--output", scores_file, "--rows", rows_file)
    assert call(*asked, "--split", "val", *size, *files, *flags) == 0
    scores = json.loads(scores_file.read_text())
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert scores.keys() >= KEYS
    assert (scores["dataset"], scores["split"], scores["samples"]) == ("refcoco", "val", 5)
    assert [row["number"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["union"] > 0 and row["expression"] and row["image"] for row in rows)
    assert all(
        row["total_reward"] == pytest.approx(row["box_iou"] ** 2 + row["iou"] ** 2) for row in rows
    )
    inner, union = (sum(row[key] for row in rows) for key in ("intersection", "union"))
    assert scores["ciou"] == pytest.approx(inner / union)
    assert scores["giou"] == pytest.approx(sum(row["iou"] for row in rows) / 5, abs=1e-5)
    assert scores["box_iou"] == pytest.approx(sum(row["box_iou"] for row in rows) / 5)
    *table, said_scores, said_rows = capsys.readouterr().out.splitlines()
    assert said_scores == f"{scores_file}: the scores"
    assert said_rows == f"{rows_file}: a row for each sample"
    table, cut = table[: len(evaluate.SHOWN) + 2], table[len(evaluate.SHOWN) + 2 :]
    said = f"{scores['truncated']} of 5 completions were cut off before their end: --max_length 768"
    assert len(cut) == bool(scores["truncated"]) and all(said in text for text in cut)
    assert [line.split()[-2] for line in table[-3:]] == [
        "precision_at_0.5",
        "format_rate",
        "seconds",
    ]
    assert table[0].split() == ["data", "set", "refcoco"]
    assert f"gIoU {scores['giou']:.3f}".split() in [line.split() for line in table]


def test_a_score_that_is_not_there():
    scores = dict.fromkeys(evaluate.SHOWN, 0.5) | {"samples": 12345, "box_iou": None}
    scores |= {"dataset": "refcoco", "split": "val"}
    heading, line, _ = evaluate.table([scores, scores]).splitlines()
    assert "12,345" in line and "–" in line and "precision_at_0.5  format_rate" in heading
    assert ["box", "IoU", "–"] in [line.split() for line in evaluate.table([scores]).splitlines()]


def test_only_the_official_data_sets_have_the_official_limit():
    """Of a large picture it would leave no token for the completion."""
    assert (
        evaluate.length_limit("refcoco", None) == evaluate.length_limit("reason_seg", None) == 768
    )
    assert evaluate.length_limit("folder", None) is None
    assert evaluate.length_limit("folder", 900) == evaluate.length_limit("refcoco", 900) == 900
    scores = {"dataset": "folder", "split": "val", "samples": 1200, "truncated": 7}
    line = evaluate.cut_off(scores, None, 256)
    assert line.startswith("folder val: 7 of 1,200 completions were cut off before their end")
    assert "allows 256 tokens" in line and "--max_length" not in line


def test_mistakes_are_one_line(refused, asked, tmp_path, data_dir):
    def says(*flags):
        return refused(evaluate.main, *asked, *flags)

    assert "split: 'testQ' is none of train, val" in says("--split", "testQ")
    assert "--split" in refused(evaluate.main, *asked)
    val = ("--split", "val")
    assert "refs(unc).p is missing" in says(*val, "--data_dir", tmp_path)
    assert "refs(umd).p is missing" in says(*val, "--dataset", "refcocog")
    error = says(*val, "--dataset", "coco")
    assert "one of refcoco, refcoco+, refcocog, " in error and "folder, got coco" in error
    assert "reason_seg/ReasonSeg is missing" in says(*val, "--dataset", "reason_seg")
    assert "GroundingSuite-Eval.jsonl is missing" in says(*val, "--dataset", "grounding_suite")
    assert "--max_length: expected a whole number of at least 1" in says(*val, "--max_length", 0)
    assert "--batch_size: expected a whole number of at least 1" in says(*val, "--batch_size", 0)
    assert "--limit: expected a whole number of at least 1" in says(*val, "--limit", "many")
    assert "no checkpoint there" in says(*val, "--checkpoint", tmp_path / "nowhere")
    assert "either --dataset" in says(*val, "--suite", "refcoco")
    none = [a for a in asked if a not in ("--dataset", "refcoco")]
    assert "got coco" in refused(evaluate.main, *none, "--suite", "refcoco,coco")
    assert "folder needs a split" in refused(evaluate.main, *none, "--suite", "folder")
    assert "names splits itself" in refused(evaluate.main, *none, *val, "--suite", "refcoco")
    assert "--devices 99" in says(*val, "--devices", 99)
    assert "did you mean --limit" in says(*val, "--limits", 3)
    assert "float32, bfloat16, got half" in says(*val, "--precision", "half")
    assert f"--rows: {tmp_path}: a folder, not a file" in says(*val, "--rows", tmp_path)
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "scores.json"
    assert "--output: " in (error := says(*val, "--output", below))
    assert f"{tmp_path / 'file'}: " in error and "give another path" in error


def test_a_damaged_picture_is_named(asked, data_dir, tmp_path, capfd):
    """Scores over a part of the data are no scores."""
    shutil.copytree(data_dir, tmp_path / "data")
    pictures = sorted((tmp_path / "data").glob("refer_seg/images/**/*.jpg"))
    pictures[1].write_bytes(b"no picture")
    output = tmp_path / "scores.json"
    flags = ("--split", "val", "--data_dir", tmp_path / "data", "--output", output)
    assert call(*asked, *flags) == 2
    assert not output.exists()
    error = capfd.readouterr().err
    assert error.startswith("lens-jax: ") and " · refcoco val · float32\n" in error
    assert f"error: {pictures[1]}: not a readable picture" in error


def test_batch_sizes_and_devices_agree(asked, tmp_path, monkeypatch):
    """Nine expressions: the last batch is filled up.

    Programs of other shapes may round differently: a pixel may be another one where its logit is
    next to 0.
    """
    scores, rows, logits, sizes = {}, {}, {}, {}

    def respond(lens, prompts, *args, **options):
        sizes[key] = len(prompts.tokens)
        return answer(lens, prompts, *args, **options)

    answer = Lens.respond
    monkeypatch.setattr(Lens, "respond", respond)

    def upsampled(low, size):
        logits[key].append(images.upsample_logits(low, size))
        return logits[key][-1]

    monkeypatch.setattr(evaluation, "upsample_logits", upsampled)
    for devices, batch_size in ((1, 3), (8, 2)):
        files = [tmp_path / f"{devices}-{batch_size}.{end}" for end in ("json", "jsonl")]
        flags = ("--split", "val", "--limit", 9, "--batch_size", batch_size, "--devices", devices)
        flags = (*asked, *flags, "--output", files[0], "--rows", files[1])
        key = devices, batch_size
        logits[key] = []
        assert evaluate.main([str(flag) for flag in flags]) == 0
        scores[key] = json.loads(files[0].read_text()) | {"seconds": None}
        rows[key] = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert sizes == {(1, 3): 3, (8, 2): 16}
    assert scores[1, 3]["samples"] == len(rows[8, 2]) == 9
    for one, eight, a, b in zip(rows[1, 3], rows[8, 2], logits[1, 3], logits[8, 2], strict=True):
        assert one["completion"] == eight["completion"] and one["box"] == eight["box"]
        other = (a > 0) != (b > 0)
        assert np.all(np.abs(a[other]) < 1e-4)
        assert abs(one["intersection"] - eight["intersection"]) <= other.sum()
        assert abs(one["union"] - eight["union"]) <= other.sum()


def test_a_suite_and_its_page(asked, tmp_path, capsys):
    """The split val twice: rows and scores name where they come from."""
    files = [tmp_path / name for name in ("scores.json", "rows.jsonl", "new/page.html")]
    output = ("--output", files[0], "--rows", files[1], "--page", files[2])
    named = [a for a in asked if a not in ("--dataset", "refcoco")]
    assert call(*named, "--suite", "refcoco:val,refcoco:train", "--limit", 3, *output) == 0
    scores = json.loads(files[0].read_text())
    assert [(s["dataset"], s["split"]) for s in scores] == [
        ("refcoco", "val"),
        ("refcoco", "train"),
    ]
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert len(rows) == sum(s["samples"] for s in scores)
    assert {row["split"] for row in rows} == {"val", "train"}
    page = files[2].read_text()
    for text in ("Worst", "Best", "Random", "histogram of mask IoU", rows[0]["expression"]):
        assert text in page
    assert page.count("data:image/jpeg;base64,") >= len(rows)
    assert "Object size" in page and "Words of the expression" in page
    assert "http" not in page
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + sum(s["truncated"] > 0 for s in scores) + len(files)
    assert lines[-1] == f"{files[2]}: the page"


def test_a_split_that_fails_costs_none_before_it(asked, tmp_path, monkeypatch, capfd):
    """Nor does Ctrl-C in one, also where the exception is dropped; a full disk costs no score."""
    done, score = [], evaluation.evaluate

    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def evaluate_one(*args, **options):
        done.append(1)
        if how == "fails" and len(done) == 2:
            raise SampleError("b.jpg cannot be read")
        if how == "interrupted" and len(done) == 2:
            Dropping()
            return score(*args, **options)
        scores, rows = known[0] = known[0] or score(*args, **options)
        return scores | {"split": options["split"]}, rows

    how, known = "fails", [None]
    monkeypatch.setattr(evaluation, "evaluate", evaluate_one)
    files = [tmp_path / "scores.json", tmp_path / "rows.jsonl"]
    named = [a for a in asked if a not in ("--dataset", "refcoco")]
    suite = ("--suite", "refcoco:val,refcoco:train", "--limit", 3)
    assert call(*named, *suite, "--output", files[0], "--rows", files[1]) == 2
    assert [scores["split"] for scores in json.loads(files[0].read_text())] == ["val"]
    assert len(files[1].read_text().splitlines()) == 3

    done.clear()
    how = "interrupted"
    for file in files:
        file.unlink()
    capfd.readouterr()
    assert call(*named, *suite, "--output", files[0], "--rows", files[1]) == 130
    out, error = capfd.readouterr()
    assert out == "" and "Traceback" not in error and "Exception" not in error
    said = f"stopped: 1 of 2 splits done in {files[0]}, {files[1]}"
    assert error.replace("\r", "\n").rstrip("\n").split("\n")[-1] == said
    assert [scores["split"] for scores in json.loads(files[0].read_text())] == ["val"]

    done.append(1)
    how = "full disk"

    def full(file, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr("lens_jax.files.write_text", full)
    assert call(*named, *suite, "--output", files[0]) == 2
    out, error = capfd.readouterr()
    assert out.count("\nrefcoco   ") == 2
    assert f"error: --output: {files[0]}: the disk is full: make room, then" in error


def test_what_a_suite_names():
    assert evaluate.chosen("reason_seg, refcoco+:testA,grounding_suite") == [
        ("reason_seg", "val"),
        ("reason_seg", "test"),
        ("refcoco+", "testA"),
        ("grounding_suite", "all"),
    ]


def test_groups_and_histogram():
    bars = evaluation_page.histogram([0.0, 0.01, 0.5, 1.0])
    assert len(bars) == 20 and [bar[1] for bar in bars if bar[1]] == [1.0, 0.5, 0.5]
    assert bars[-1][2].endswith(": 1 sample")
