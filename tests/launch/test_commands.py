"""Every command explains itself, without waiting for JAX, and its mistyped flags."""

import subprocess
import sys
from pathlib import Path

import pytest

from lens_jax.commands import compare, compile, data, demo, evaluate, predict, train
from lens_jax.convert_weights import __main__ as convert_weights

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["demo", "evaluate", "predict"])
def test_help_shows_an_example(command, tmp_path):
    """From any folder, as a script."""
    script = ROOT / "launch" / f"{command}.py"
    shown = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert f"python launch/{command}.py --checkpoint runs/tiny/final" in shown
    assert "--checkpoint" in shown.split("example:")[0]


@pytest.mark.parametrize(
    ("main", "typed", "meant"),
    [
        (train.main, "--grpo.stepz 3", "grpo.steps"),
        (train.main, "--confg configs/tiny.yaml", "config"),
        (evaluate.main, "--checkpont lens", "--checkpoint"),
        (predict.main, "--promt circle", "--prompt"),
        (demo.main, "--hots 0.0.0.0", "--host"),
        (compare.main, "runs/a runs/b --outptu page.html", "--output"),
        (compile.main, "--topolgy v5e:4x4 --config configs/tiny.yaml", "--topology"),
        (compile.main, "--topology v5e:4x4 --presision bfloat16", "--precision"),
        (data.main, "chekc --data_dir mine", "check"),
        (data.main, "check --data_dri mine", "--data_dir"),
        (data.main, "convert --form coco", "--from"),
        (convert_weights.main, "from_troch --mllm x", "from_torch"),
        (convert_weights.main, "from_torch --mlm x", "--mllm"),
        (convert_weights.main, "to_torch --layotu hf", "--layout"),
        (convert_weights.main, "verify --chekpoint x", "--checkpoint"),
    ],
)
def test_a_mistyped_flag_is_one_line_that_names_the_nearest(main, typed, meant, capfd):
    try:
        code = main(typed.split())
    except SystemExit as stop:
        code = stop.code
    out, error = capfd.readouterr()
    assert code == 2 and out == ""
    assert error.startswith("error: unknown") and error.count("\n") == 1
    assert f"did you mean {meant}?" in error
