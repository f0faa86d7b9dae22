"""A small generated data set and the tiny model's processor, shared by this folder's tests."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lens_jax.data.processor import Processor
from lens_jax.models.geometry import ImageGeometry
from lens_jax.preparation import shapes_refcoco

TINY = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def processor(tokenizer):
    return Processor(tokenizer, sam_size=64, geometry=ImageGeometry(window_size=56))


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """40 scenes for training, 10 of each other split, on disk."""
    directory = tmp_path_factory.mktemp("shapes")
    shapes_refcoco.write_refcoco(
        directory, {"train": 40, "val": 10, "testA": 10, "testB": 10}, seed=3
    )
    return directory
