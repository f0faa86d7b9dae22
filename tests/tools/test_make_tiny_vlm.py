"""The script that makes the tiny Qwen2.5-VL still works, for a few steps."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from lens_jax.data.sources import shapes
from tools import make_tiny_vlm

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"


@pytest.fixture
def folder(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, tmp_path)
    return tmp_path


@pytest.mark.nightly
def test_a_few_steps(folder):
    parts = {"scenes": 64, "vision_steps": 3, "tight_steps": 3, "loose_steps": 2}
    losses = make_tiny_vlm.train(make_tiny_vlm.Settings(output=folder, **parts))
    assert list(losses) == ["vision", "tight", "loose"]
    assert all(np.isfinite(values).all() for values in losses.values())
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    before = load_file(folder / "model.safetensors")
    again = make_tiny_vlm.Settings(
        output=folder, start=folder / "model.safetensors",
        scenes=8, vision_steps=0, tight_steps=0, loose_steps=1,
    )  # fmt: skip
    make_tiny_vlm.train(again)
    after = load_file(folder / "model.safetensors")
    change = max(np.abs(after[name] - before[name]).max() for name in before)
    assert 0 < change < 0.01  # it went on from there


def test_loose_boxes():
    rng = np.random.default_rng(0)
    box = (40, 50, 60, 80)
    drawn = np.array([make_tiny_vlm.loosen(box, rng) for _ in range(2000)])
    moved = (drawn - box) * [-1, -1, 1, 1] / [20, 30, 20, 30]
    assert moved.min() >= 0 and moved.max() <= 0.5
    np.testing.assert_allclose(moved.mean(0), 0.25, atol=0.02)
    edge = make_tiny_vlm.loosen((0, 0, shapes.SIDE, shapes.SIDE), rng)
    assert edge == (0, 0, shapes.SIDE, shapes.SIDE)


def test_no_held_out_expression_is_taught():
    for index in range(200):
        *_, questions = make_tiny_vlm._draw(3, index)
        scene = shapes.random_scene(np.random.default_rng((3, index)))
        held_out = {
            e.text for thing in scene.objects for e in thing.expressions if shapes.is_held_out(e)
        }
        assert not held_out & {text for text, _, _ in questions}
