"""The golden set: numbers of the official PyTorch code on a tiny random model."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.golden import weights


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The golden set; `LENS_GOLDEN_DIR` points at another one of the same layout."""
    return Path(os.environ.get("LENS_GOLDEN_DIR", Path(__file__).parent / "data"))


@pytest.fixture(scope="session")
def golden_weights(golden_dir) -> dict[str, np.ndarray]:
    """Every tensor of the official state dict by its official name."""
    return weights.build(golden_dir)
