"""Every language model with every SAM trains by config, from official files, in both stages."""

import json

import pytest

from lens_jax import checkpoints
from lens_jax.commands import train
from lens_jax.model_configs.sam import write_sam
from lens_jax.training import metrics
from tests import qwen2_vl, sam1
from tests.golden import weights as golden
from tests.launch.conftest import GOLDEN
from tests.launch.test_train import arguments


# Qwen2.5-VL with SAM 2 is what test_train runs; one with neither is enough for every day.
@pytest.mark.parametrize(
    ("mllm", "sam"),
    [
        ("qwen2_vl", "sam1"),
        pytest.param("qwen2_vl", "sam2", marks=pytest.mark.nightly),
        pytest.param("qwen2_5_vl", "sam1", marks=pytest.mark.nightly),
    ],
)
def test_trains(mllm, sam, data_dir, tmp_path):
    family = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": golden}[mllm]
    flags = {
        "model.mllm": family.write_mllm(GOLDEN, tmp_path / "mllm"),
        "model.sam": golden.write_sam(GOLDEN, tmp_path / "sam")
        if sam == "sam2"
        else sam1.write_original(tmp_path / "sam", sam1.tensors(), write_sam(sam1.CONFIG)),
        "model.num_queries": 3,
        "alignment.steps": 1,
        "grpo.steps": 1,
        "data.eval_limit": 2,
        "remat": "none",
    }
    run = tmp_path / "run"
    assert train.main(arguments("null", data_dir, run, **flags)) == 0

    config = checkpoints.read_config(run / "final")
    assert config["mllm"]["model_type"] == mllm
    assert config["sam"].get("model_type", "sam2") == {"sam1": "sam"}.get(sam, sam)
    rows = metrics.read(run)
    assert [row["stage"] for row in rows] == ["alignment", "grpo"]
    assert all(row["grad_norm"] > 0 and not row["skipped_updates"] for row in rows)
    assert rows[1]["rollout_gap"] < 1e-4
    scores = json.loads((run / "evaluation.json").read_text())
    assert len(scores) == 3
