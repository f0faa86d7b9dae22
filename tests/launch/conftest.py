"""A checkpoint of random weights and a handful of pictures, for the commands to work on."""

import json
import re
from pathlib import Path

import pytest

from lens_jax import checkpoints
from lens_jax.convert_weights import from_torch
from lens_jax.preparation import shapes_refcoco
from tests.golden import weights as golden

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """Converted from Hugging Face files; completions end after 12 tokens."""
    root = tmp_path_factory.mktemp("checkpoint")
    mllm, sam = golden.write_mllm(GOLDEN, root / "mllm"), golden.write_sam(GOLDEN, root / "sam")
    from_torch(output=root / "lens", mllm=mllm, sam=sam, num_queries=3)
    config = checkpoints.read_config(root / "lens") | {"max_new_tokens": 12}
    (root / "lens" / checkpoints.CONFIG).write_text(json.dumps(config))
    checkpoints.write_manifest(root / "lens")
    return root / "lens"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Generated scenes in RefCOCO's layout, 4 of them for validation."""
    directory = tmp_path_factory.mktemp("data")
    shapes_refcoco.write_refcoco(directory, {"train": 1, "val": 4}, seed=5)
    return directory


@pytest.fixture
def refused(capfd):
    """Calls a command that must end with code 2 and one line of error, which is returned; before it
    a command may say where it computes."""

    def call(main, *argv) -> str:
        capfd.readouterr()
        assert main([str(a) for a in argv]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        err = re.sub(r"^lens-jax: .*\n", "", err)
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return call
