"""Imported first by every command: ends it with one line where Python is too old or has not the
packages, as the system's has not when .venv/bin/python is meant. Runs on any Python 3."""

# ruff: noqa: UP031, SIM

import importlib.util
import os
import sys

OLDEST = (3, 11)
# fmt: off
PACKAGES = [
    "jax", "flax", "optax", "orbax", "etils", "grain", "transformers", "numpy", "jaxtyping",
    "jinja2", "jsonargparse", "matplotlib", "cv2", "PIL", "pycocotools", "yaml", "safetensors",
    "tensorboardX", "tqdm",
]
# fmt: on


def fault():
    """What this Python lacks, and what to do; None if it can run the commands."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    python = os.path.join(os.path.relpath(root), ".venv", "bin", "python")
    if python.startswith(os.pardir):
        python = os.path.join(root, ".venv", "bin", "python")
    made = os.path.exists(python)
    use = "run %s instead" % python if made else "run make train, or pip install -e . (README.md)"
    if sys.version_info < OLDEST:
        found = "%d.%d" % sys.version_info[:2]
        return "Python %d.%d or newer is needed, %s is %s: %s" % (
            *OLDEST,
            sys.executable,
            found,
            use,
        )
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        more = " and %d more packages" % (len(missing) - 1) if len(missing) > 1 else ""
        return "%s has no %s%s: %s" % (sys.executable, missing[0], more, use)
    return None


FAULT = fault()
if FAULT:
    sys.stderr.write("error: %s\n" % FAULT)
    sys.exit(2)
