"""A web page to try a checkpoint on: `python launch/demo.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax.commands import start

if __name__ == "__main__":
    start("demo")
