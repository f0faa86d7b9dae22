"""The script that makes the tiny Qwen2.5-VL still works, and what it shipped knows its pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from lens_jax.convert_weights.convert import from_torch
from lens_jax.data import images
from lens_jax.inference import Lens
from lens_jax.preparation import shapes
from lens_jax.rewards.box import box_iou
from tools import make_tiny_vlm, tiny_vlm_data

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "tiny" / "qwen2_5_vl"


@pytest.fixture
def folder(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / file, tmp_path)
    return tmp_path


@pytest.mark.nightly
def test_a_few_steps(folder):
    parts = {"scenes": 64, "vision_steps": 3, "tight_steps": 3, "loose_steps": 2}
    losses = make_tiny_vlm.train(make_tiny_vlm.VlmSettings(output=folder, **parts))
    assert list(losses) == ["vision", "tight", "loose"]
    assert all(np.isfinite(values).all() for values in losses.values())
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    before = load_file(folder / "model.safetensors")
    again = make_tiny_vlm.VlmSettings(
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
    drawn = np.array([tiny_vlm_data.loosen(box, rng, (112, 112)) for _ in range(2000)])
    moved = (drawn - box) * [-1, -1, 1, 1] / [20, 30, 20, 30]
    assert moved.min() >= 0 and moved.max() <= 0.5
    np.testing.assert_allclose(moved.mean(0), 0.25, atol=0.02)
    assert tiny_vlm_data.loosen((0, 0, 140, 84), rng, (84, 140)) == (0, 0, 140, 84)


def test_no_held_out_expression_is_taught():
    for index in range(200):
        *_, questions = tiny_vlm_data._draw(3, index)
        scene, _ = tiny_vlm_data._picture(np.random.default_rng((3, index)))
        held_out = {
            e.text for thing in scene.objects for e in thing.expressions if shapes.is_held_out(e)
        }
        assert not held_out & {text for text, _, _ in questions}


def test_boxes_and_cells_are_those_of_the_picture():
    """As the vision tower gets it: the cell that a question names has the object's colour."""
    grids, checked = set(), 0
    for index in range(200):
        seen, *_, questions = tiny_vlm_data._draw(4, index)
        if seen is None:
            continue
        rows, columns = (int(n) for n in seen.grid)
        grids.add((rows, columns))
        cells = seen.patches.reshape(16, 2, 2, 3, 14, 14)[seen.order[: rows * columns]]
        picture = cells.reshape(rows, columns, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
        picture = picture.reshape(28 * rows, 28 * columns, 3)
        for text, (x0, y0, x1, y1), cell in questions:
            x, y = (x0 + x1) // 2, (y0 + y1) // 2
            assert cell == y // 28 * columns + x // 28
            colors = np.array(list(shapes.COLORS.values()))
            nearest = np.abs(picture[y, x].astype(int) - colors).sum(1).argmin()
            checked += list(shapes.COLORS)[nearest] in text
            assert x1 <= 28 * columns and y1 <= 28 * rows
    assert {(4, 4), (3, 4), (4, 3), (3, 5), (5, 3), (2, 5), (5, 2)} <= grids
    assert checked > 400


def test_the_processor_brings_every_size_to_that_of_training():
    config = json.loads((SHIPPED / "preprocessor_config.json").read_text())
    limits = config["min_pixels"], config["max_pixels"]
    assert limits == (tiny_vlm_data.MIN_PIXELS, tiny_vlm_data.MAX_PIXELS)
    for side in range(20, 1000):
        assert images.smart_resize(side, side, *limits) == (112, 112)


@pytest.mark.nightly
def test_shipped_weights_know_pictures_of_many_kinds(tmp_path):
    from_torch(output=tmp_path, mllm=SHIPPED, sam=SHIPPED.parent / "sam2", num_queries=8)
    lens = Lens.from_pretrained(tmp_path)

    def score(size: tuple[int, int], plain: bool = False) -> float:
        """Mean box IoU on scenes of the area 112 x 112, given as pictures of (height, width)."""
        shrunk = tuple(round(n * 112 / np.sqrt(np.prod(size))) for n in size)
        asked, true = [], []
        for index in range(48):
            scene = shapes.random_scene(np.random.default_rng((6, index)), shrunk, plain)
            thing = next(o for o in scene.objects if o.expressions)
            asked.append((images.resize(scene.image, size), thing.expressions[0].text))
            true.append(thing.box * np.tile(np.divide(size, shrunk)[::-1], 2))
        results = lens.segment_batch(*zip(*asked, strict=True))
        boxes = np.array([np.zeros(4) if r.box is None else r.box for r in results])
        return float(np.mean(box_iou(boxes, np.array(true))))

    usual = score((112, 112))
    assert 0.4 < usual < 0.55
    for size in ((84, 84), (140, 140), (256, 256), (120, 160), (160, 120), (144, 256)):
        assert score(size) == pytest.approx(usual, abs=0.1), size
    assert score((112, 112), plain=True) == pytest.approx(usual, abs=0.1)
    assert score((200, 150), plain=True) == pytest.approx(usual, abs=0.1)
