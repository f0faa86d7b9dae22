"""launch/compare.py: several runs on one page."""

import json

import pytest

from launch import compare


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
