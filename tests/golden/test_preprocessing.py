"""Sizes, boxes, resized pictures, patches and prompts against the official preprocessing."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from lens_jax.data import images, prompts
from lens_jax.data.processor import Processor
from lens_jax.models.geometry import ImageGeometry
from lens_jax.models.sam.segmenter import Sam2


@pytest.fixture(scope="module")
def rows(golden_dir):
    return json.loads((golden_dir / "preprocessing.json").read_text())


@pytest.fixture(scope="module")
def arrays(golden_dir):
    with np.load(golden_dir / "preprocessing.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def settings(golden_dir):
    return json.loads((golden_dir / "lens_tiny" / "preprocessor_config.json").read_text())


def numbered(arrays, name):
    return [arrays[f"{name}_{i}"] for i in range(len(arrays)) if f"{name}_{i}" in arrays]


def sampled(array, arrays, name):
    """Our values at the stored places, and the stored values."""
    assert tuple(array.shape) == tuple(arrays[f"{name}_shape"])
    return array.reshape(-1)[arrays[f"{name}_idx"]], arrays[f"{name}_val"]


def test_sizes(rows):
    for row in rows["rows"]:
        height, width = row["height"], row["width"]
        assert list(images.longest_side(height, width, 640)) == row["resize_longest_640_hw"]
        if "error" in row:
            with pytest.raises(ValueError) as error:
                images.smart_resize(height, width)
            assert row["gs_eval_error"] in str(error.value)
        else:
            assert images.smart_resize(height, width) == (
                row["resized_height"],
                row["resized_width"],
            )


def test_boxes(rows):
    for row in rows["rows"]:
        if "error" in row:
            continue
        x, y, w, h = row["bbox_xywh"]
        size, resized = (row["height"], row["width"]), (row["resized_height"], row["resized_width"])
        for scheme in prompts.COORDINATES:
            scale = prompts.coordinate_scale(resized, scheme)
            assert list(prompts.box_to_text((x, y, x + w, y + h), size, scale)) == row[scheme]


def test_rounding_ties(rows):
    for tie in rows["rounding_ties"]:
        box = prompts.box_to_text((tie["x"], 0, 0, 0), (1, tie["w"]), (1, tie["norm"]))
        assert box[0] == tie["round"]


def test_pictures(arrays, settings):
    pictures = numbered(arrays, "img")
    assert pictures
    for i, picture in enumerate(pictures):
        expected = arrays[f"llm_resized_pil_default_bicubic_{i}"]
        size = images.smart_resize(*picture.shape[:2])
        np.testing.assert_array_equal(images.resize(picture, size), expected)
        sides = [k for k in arrays if k.startswith("sam_resized") and k.endswith(f"_{i}")]
        for key in sides:
            square = images.sam_pixels(picture, len(arrays[key]))
            np.testing.assert_array_equal(square, arrays[key])
            channels_first = np.asarray(Sam2.normalize(None, square)).transpose(2, 0, 1)
            stored = sampled(channels_first, arrays, f"sam_normalised_{i}")
            np.testing.assert_allclose(*stored, atol=1e-5)
        for key in arrays:
            if key.startswith("resize_longest") and key.endswith(f"_{i}"):
                longest = int(key.removeprefix("resize_longest").split("_")[0])
                size = images.longest_side(*picture.shape[:2], longest)
                np.testing.assert_array_equal(images.resize(picture, size), arrays[key])
        patches, grid = images.patchify(expected, settings["image_mean"], settings["image_std"])
        np.testing.assert_allclose(*sampled(patches, arrays, f"pixel_values_{i}"), atol=1e-6)
        assert [1, *grid] == arrays[f"image_grid_thw_{i}"][0].tolist()


def test_picture_of_any_size(arrays, settings):
    """The image processor on a picture that was not resized before."""
    picture = arrays["raw_img"]
    size = images.smart_resize(*picture.shape[:2], settings["min_pixels"], settings["max_pixels"])
    patches, grid = images.patchify(
        images.resize(picture, size), settings["image_mean"], settings["image_std"]
    )
    np.testing.assert_allclose(*sampled(patches, arrays, "raw_pixel_values"), atol=1e-6)
    assert [1, *grid] == arrays["raw_grid"][0].tolist()


def test_upsampled_logits(arrays):
    logits = arrays["lowres_logits"][0, 0]
    names = {k.removesuffix("_shape").removesuffix("_idx").removesuffix("_val") for k in arrays}
    names = [name for name in names if name.startswith("postprocess_")]
    assert names
    for name in names:
        size = tuple(int(n) for n in name.removeprefix("postprocess_").split("x"))
        ours = images.upsample_logits(logits, size)[None, None]
        if name in arrays:
            np.testing.assert_allclose(ours, arrays[name], atol=2e-5)
        else:
            np.testing.assert_allclose(*sampled(ours, arrays, name), atol=2e-5)


def test_prompts(golden_dir):
    """Pictures and questions become the official tokens, positions and pixel values."""
    stored = json.loads((golden_dir / "mllm_forward_prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(golden_dir / "lens_tiny")
    config = json.loads((golden_dir / "lens_tiny" / "config.json").read_text())
    geometry = ImageGeometry(window_size=config["vision_config"]["window_size"])
    processor = Processor(tokenizer, sam_size=64, geometry=geometry)
    with np.load(golden_dir / "mllm_forward.npz") as file:
        arrays = dict(file)
    start = 0
    for i, question in enumerate(stored["questions"]):
        prompt = processor.prompt(Image.fromarray(arrays[f"image_{i}"]), question)
        real = arrays["attention_mask"][i].astype(bool)
        np.testing.assert_array_equal(prompt.tokens, arrays["input_ids"][i][real])
        np.testing.assert_array_equal(prompt.positions, arrays["position_ids"][:, i][:, real])
        assert prompt.next_position == arrays["position_ids"][:, i][:, real].max() + 1
        # Window order undone by the positions of the patches: official order is units row-major.
        count = int(np.prod(arrays["image_grid_thw"][i]))
        row, column = prompt.patch_positions[prompt.patch_mask].T
        columns = arrays["image_grid_thw"][i][2]
        order = (row // 2 * (columns // 2) + column // 2) * 4 + row % 2 * 2 + column % 2
        patches = np.empty((count, prompt.patches.shape[-1]), np.float32)
        patches[order] = prompt.patches[prompt.patch_mask]
        np.testing.assert_allclose(
            patches, arrays["pixel_values"][start : start + count], atol=1e-6
        )
        start += count


def test_stage_1_answers(golden_dir):
    stored = json.loads((golden_dir / "stage1_loss_texts.json").read_text())
    for text, problem, solution in zip(
        stored["prompts_text_after_expansion"],
        stored["problems"],
        stored["solutions"],
        strict=True,
    ):
        assert text.endswith("assistant\n" + prompts.answer_text(problem, json.loads(solution)))
