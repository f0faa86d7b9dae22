"""launch/evaluate.py: scores, rows, mistakes."""

import json
import shutil

import pytest

from launch import evaluate

KEYS = {
    "dataset", "split", "samples", "ciou", "giou", "box_iou", "precision_at_0.5", "format_rate",
    "seconds",
}  # fmt: skip


def call(*argv) -> int:
    return evaluate.main([str(a) for a in argv])


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
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[-2:] == ["format", "seconds"]
    assert line.startswith("refcoco ") and f"{scores['giou']:.3f}" in line.split()


def test_a_score_that_is_not_there():
    scores = dict.fromkeys(evaluate.COLUMNS, 0.5) | {"samples": 12345, "box_iou": None}
    line = evaluate.table([scores]).splitlines()[1]
    assert "12,345" in line and "–" in line


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
    assert "--suite" in says(*val, "--suite", "a,b")


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
    assert f"error: {pictures[1]}: not a readable picture" in error
