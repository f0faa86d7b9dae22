"""What a process imports, and what it does not wait for."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
import lens_jax.inference, lens_jax.training.run
from lens_jax.commands import demo, evaluate, predict, train
print(json.dumps([name for name in sys.modules if name.startswith("lens_jax.")]))
"""


def test_no_run_imports_what_studies_programs():
    """Compiled HLO, FLOPs, slices of TPUs, and the conversion of data sets."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    imported = json.loads(done.stdout)
    assert "lens_jax.training.stages" in imported
    apart = ("lens_jax.aot", "lens_jax.commands.compile", "lens_jax.preparation.conversion")
    assert [name for name in imported if name.startswith(apart)] == []
