"""launch/compare.py: several runs on one page."""

import html
import json

import pytest

from lens_jax.commands import compare


@pytest.fixture
def runs(tmp_path):
    made = []
    for name, rate in (("first", 0.1), ("second", 0.2)):
        run = tmp_path / name
        run.mkdir()
        rows = [
            {"stage": "grpo", "step": s, "reward": rate * s, "reward/box": rate, "kl": None}
            for s in (1, 2, 3)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "config.yaml").write_text(f"grpo: {{learning_rate: {rate}, steps: 3}}\n")
        (run / "evaluation.json").write_text(json.dumps({"after_grpo": {"giou": rate + 0.5}}))
        made.append(run)
    return made


def test_a_line_for_each_run(runs, tmp_path):
    page = tmp_path / "new" / "page.html"
    assert compare.main([*map(str, runs), "--output", str(page)]) == 0
    text = page.read_text()
    assert "0.600" in text and "0.700" in text  # scores
    assert "grpo.learning_rate" in text and "grpo.steps" not in text
    assert text.count("<svg") == 2  # reward and its channel; KL has no values
    assert text.count('class="smooth') == 4
    assert "http" not in text


def test_mistakes_are_one_line(refused, runs, tmp_path):
    page = tmp_path / "page.html"
    assert "metrics.jsonl is missing" in refused(compare.main, tmp_path, "--output", page)
    (runs[1] / "config.yaml").write_text("grpo: {steps: [\n")
    said = refused(compare.main, *runs, "--output", page)
    assert f"{runs[1] / 'config.yaml'} cannot be read: " in said
    (runs[0] / "evaluation.json").write_text("{")
    said = refused(compare.main, *runs, "--output", page)
    assert f"{runs[0] / 'evaluation.json'} is not JSON" in said
    assert "--output" in refused(compare.main, *runs)
    assert "did you mean --output" in refused(compare.main, *runs, "--output", page, "--outptu", 1)


SHAPES = {"train_scenes": 9, "eval_scenes": 3, "seed": 0}
DATA = {"dataset": "folder", "data_dir": "a", "eval_split": "val", "eval_limit": None}


def warned(runs, tmp_path, capsys, first, second, rows=(None, None)):
    """What is said of two runs with these `data` sections and rows of evaluations."""
    for run, data, asked in zip(runs, (first, second), rows, strict=True):
        (run / "config.yaml").write_text(json.dumps({"data": data}))
        file = run / "evaluation" / "after_grpo.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        if asked:
            lines = [json.dumps({"image": image, "expression": text}) for image, text in asked]
            file.write_text("\n".join(lines) + "\n")
    page = tmp_path / "page.html"
    capsys.readouterr()
    assert compare.main([*map(str, runs), "--output", str(page)]) == 0
    err = capsys.readouterr().err.splitlines()
    shown = html.unescape(page.read_text())
    assert shown.count('class="card warning"') == len(err)
    assert all(line.startswith("warning: ") and line[9:] in shown for line in err)
    return err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "refcoco"}, "data.dataset folder and refcoco"),
        ({"eval_split": "test"}, "data.eval_split val and test"),
        ({"eval_limit": 32}, "data.eval_limit None and 32"),
        ({"reasoning": True}, "data.reasoning False and True"),
        ({"data_dir": "b"}, "data.data_dir"),
        ({"dataset": "refcoco", "shapes": SHAPES}, "data.dataset folder and refcoco"),
    ],
)
def test_different_held_out_data_is_warned_of(runs, tmp_path, capsys, change, said):
    data = DATA | {"reasoning": False}
    assert warned(runs, tmp_path, capsys, data, data) == []
    first, *_ = warned(runs, tmp_path, capsys, data, data | change)
    assert (
        first.startswith("warning: first and second: scores cannot be compared") and said in first
    )


def test_rows_tell_what_was_scored(runs, tmp_path, capsys):
    """A limit that left nothing out is no difference; other sentences under one name are."""
    a, b, c = ("x/1.png", "a"), ("y/1.png", "a"), ("x/1.png", "b")
    both = warned(runs, tmp_path, capsys, DATA, DATA | {"eval_limit": 5}, ([a, c], [b, c]))
    assert both == []
    (line,) = warned(runs, tmp_path, capsys, DATA, DATA, ([a, c], [a, a]))
    assert "1 samples alike of 2 and 2" in line
    drawn = {"dataset": "refcoco", "data_dir": None, "shapes": SHAPES}
    fewer = drawn | {"shapes": SHAPES | {"train_scenes": 5}}
    (line,) = warned(runs, tmp_path, capsys, drawn, fewer, ([a], [("z/7.png", "a")]))
    assert "curves are of different training data (data.shapes.train_scenes 9 and 5)" in line


def test_the_page_says_what_was_evaluated(runs, tmp_path, refused):
    (runs[1] / "evaluation.json").write_text(json.dumps({"before": {"giou": 0.1, "samples": 3}}))
    page = tmp_path / "page.html"
    assert compare.main([*map(str, runs), "--output", str(page)]) == 0
    text = page.read_text()
    assert "<td>after GRPO (stage 2)</td><td>before</td>" in text
    assert "IoU of the two masks, mean over samples" in text and "<h2>GRPO (stage 2)</h2>" in text
    assert "given twice" in refused(compare.main, runs[0], runs[0], "--output", page)
    (runs[0] / "evaluation").mkdir()
    (runs[0] / "evaluation" / "after_grpo.jsonl").write_text("{")
    said = refused(compare.main, *runs, "--output", page)
    assert "after_grpo.jsonl holds no rows of an evaluation" in said
