"""LENS on Qwen2-VL: both stages, evaluation and inference, boxes in 0..1000."""

import json

import numpy as np
import pytest

from launch import train
from lens_jax import Lens, checkpoints
from lens_jax.models.lens import LensConfig
from lens_jax.training import metrics
from tests import qwen2_vl
from tests.golden import weights as golden
from tests.launch.conftest import GOLDEN
from tests.launch.test_train import arguments
from tools.convert_weights import from_torch


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """One step of each stage; the checkpoint it started from and its directory."""
    root = tmp_path_factory.mktemp("qwen2_vl")
    mllm = qwen2_vl.write_mllm(GOLDEN, root / "mllm")
    sam = golden.write_sam(GOLDEN, root / "sam")
    from_torch(output=root / "start", mllm=mllm, sam=sam, num_queries=3)
    short = {
        "precision": "float32",
        "data.eval_limit": 2,
        "samples": 1,
        "alignment.steps": 1,
        "alignment.learning_rate": 1e-3,
        "alignment.warmup_steps": 0,
        "alignment.schedule": "constant",
        "grpo.steps": 1,
        "grpo.learning_rate": 1e-3,
        "rewards.format": 1.0,
    }
    assert train.main(arguments(root / "start", data_dir, root / "run", **short)) == 0
    return root / "start", root / "run"


def test_both_stages_train(run):
    start, directory = run
    rows = metrics.read(directory)
    assert [row["stage"] for row in rows] == ["alignment", "grpo"]
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows)
    assert rows[1]["rollout_gap"] < 1e-4
    scores = json.loads((directory / "evaluation.json").read_text())
    assert list(scores) == ["before", "after_alignment", "after_grpo"]
    config = checkpoints.read_config(directory / "final")
    assert config["coordinates"] == "qwen2vl"
    assert LensConfig.from_dict(config).mllm.vision.family == "qwen2_vl"

    before = dict(checkpoints.iterate_params(start))
    after = dict(checkpoints.iterate_params(directory / "final"))
    assert before.keys() == after.keys()
    still = {
        name
        for name in before
        if name.startswith("visual/") and np.array_equal(before[name], after[name])
    }
    assert not still
    assert {"visual/blocks/1/fc1/kernel", "visual/merger/norm/bias"} <= before.keys()


def test_a_box_is_given_in_pixels_of_the_picture(run, monkeypatch):
    """The text says thousandths of the sides, whatever the picture is resized to."""
    lens = Lens.from_pretrained(run[1] / "final")
    read_text = lens._read_text

    def always_a_box(tokens, lengths):
        box = np.tile(np.float32([100, 250, 500, 1000]), (len(tokens), 1))
        return read_text(tokens, lengths) | {"box": box, "box_found": np.ones(len(tokens), bool)}

    monkeypatch.setattr(lens, "_read_text", always_a_box)
    result = lens.segment(np.zeros((60, 90, 3), np.uint8), "it")
    np.testing.assert_allclose(result.box, [9, 15, 45, 60], rtol=1e-6)
    assert result.mask.shape == (60, 90)
