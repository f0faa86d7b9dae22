"""The script behind checkpoints/tiny/sam2 still works, and what it shipped still segments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from lens_jax.convert_weights.sam2 import table
from lens_jax.convert_weights.table import params_from
from lens_jax.model_configs.sam import read_sam2
from lens_jax.models.layers import shapes_of
from lens_jax.models.sam.segmenter import Sam2
from lens_jax.preparation import shapes
from tests import xla
from tools import make_tiny_sam, tiny_sam_data

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "tiny" / "sam2"


def load(directory: Path) -> Sam2:
    config = read_sam2(json.loads((directory / "sam2_config.json").read_text()))
    model = shapes_of(lambda rngs: Sam2(config, rngs=rngs))
    nnx.update(model, params_from(table(config), load_file(directory / "model.safetensors")))
    return model


@pytest.mark.nightly
def test_a_few_steps(tmp_path, monkeypatch):
    """The command trains, saves and evaluates; the saved model is the trained one."""
    # One length of prompts instead of three: most of the time is compilation.
    prompts = {"points+": (1, 1, -1), "box+": (2, 3, -1)}
    monkeypatch.setattr(make_tiny_sam, "PROMPTS", prompts)
    monkeypatch.setattr(make_tiny_sam, "LENGTHS", [3])
    counts = {"dense_steps": 3, "steps": 12, "loose_steps": 2, "images": 2, "evaluation_scenes": 4}
    arguments = [text for name, n in counts.items() for text in (f"--{name}", str(n))]
    arguments += ["--learning_rate", "0.005", "--output", str(tmp_path)]
    # A process of its own: without any optimization, as tests are compiled, the step gives NaN.
    command = (
        f"from tools import make_tiny_sam, tiny_sam_data; tiny_sam_data.PROMPTS = {prompts}; "
        f"tiny_sam_data.LENGTHS = [3]; make_tiny_sam.main({arguments})"
    )
    environment = dict(os.environ, XLA_FLAGS=xla.flags(optimization=1))
    root = SHIPPED.parents[2]
    subprocess.run([sys.executable, "-c", command], check=True, env=environment, cwd=root)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 12
    assert record["last_loss"] < 0.8 * record["first_loss"]
    scores = make_tiny_sam.evaluate(load(tmp_path), make_tiny_sam.SamSettings(evaluation_scenes=4))
    assert set(scores) == set(prompts) | {f"{prompt}, stability rule" for prompt in prompts}
    assert scores == pytest.approx(record["held_out_mean_iou"], abs=1e-3)


def test_loose_masks_have_a_margin():
    mask = np.zeros((1, 9, 9), bool)
    mask[0, 3, 4] = mask[0, 0, 0] = True
    wider = np.asarray(make_tiny_sam.dilate(mask, 2))
    expected = np.zeros((1, 9, 9), bool)
    expected[0, 1:6, 2:7] = expected[0, :3, :3] = True
    np.testing.assert_array_equal(wider, expected)
    np.testing.assert_array_equal(make_tiny_sam.dilate(mask, 0), mask)


def test_batches_are_prompts_of_their_objects():
    batch = tiny_sam_data.draw_batch(np.random.default_rng(0), images=3, objects=2)
    size = tiny_sam_data.CONFIG.mask_size
    assert batch.cover.shape == (3, size, size)
    for length, points, targets in zip(
        tiny_sam_data.LENGTHS, batch.points, batch.targets, strict=True
    ):
        prompts = np.repeat(tiny_sam_data.prompts_of(length), 2)
        assert points.shape == (3, len(prompts), length, 2)
        for row, g in np.ndindex(3, len(prompts)):
            mask, box = targets.masks[row, g], targets.boxes[row, g] * shapes.SIDE
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            # A pixel of a stretched mask is what lies at its upper left corner.
            np.testing.assert_array_equal(
                np.ceil(box - 1e-4), [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            )
            slack = max((box[2] - box[0]) / 6, 1) + 1e-3
            labels = tiny_sam_data.PROMPTS[prompts[g]]
            for label, point in zip(labels, points[row, g], strict=True):
                x, y = (point + 0.5) / tiny_sam_data.SCALE
                if label == 1:
                    assert mask[int(y), int(x)]
                elif label in (2, 3):
                    corner = box[:2] if label == 2 else box[2:]
                    assert np.abs(corner - [x, y]).max() <= slack


def test_shipped_weights_segment_held_out_pictures():
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3.5 * 2**20
    settings = make_tiny_sam.SamSettings(evaluation_scenes=64, seed=1234)
    scores = make_tiny_sam.evaluate(load(SHIPPED), settings)
    # They find the object and draw it with a margin.
    assert 0.6 < scores["box"] < 0.8 and 0.6 < scores["box+"] < 0.8
    assert 0.55 < scores["point"] < 0.8 and 0.55 < scores["point+"] < 0.8
    assert np.isfinite(list(scores.values())).all()
