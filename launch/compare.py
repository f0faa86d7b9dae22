"""Curves of several runs over each other: `python launch/compare.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax.commands import start

if __name__ == "__main__":
    start("compare")
