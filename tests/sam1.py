"""A small SAM 1 of random weights, as Meta's files hold it."""

import json
from pathlib import Path

import numpy as np
import pytest

from lens_jax.convert_weights import parameter_shapes
from lens_jax.convert_weights.sam1 import table
from tests import micro

torch = pytest.importorskip("torch")

CONFIG = micro.WITH_SAM1.sam


def tensors() -> dict[str, np.ndarray]:
    """Its tensors under their original names."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(micro.WITH_SAM1)
    return {
        entry.source: np.float32(0.3)
        * rng.standard_normal(entry.transform.source_shape(shapes[entry.target]), np.float32)
        for entry in table(CONFIG).entries
    }


def write_original(
    directory: Path, tensors: dict[str, np.ndarray], config: dict | None = None
) -> Path:
    """A state dict with `sam_config.json` beside it, if `config` is given; returns the file."""
    directory.mkdir(exist_ok=True)
    file = directory / "sam_vit_x.pth"
    torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, file)
    if config:
        (directory / "sam_config.json").write_text(json.dumps(config))
    return file
