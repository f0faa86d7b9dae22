"""Every command explains itself, without waiting for JAX."""

import subprocess
import sys
from pathlib import Path

import pytest

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
