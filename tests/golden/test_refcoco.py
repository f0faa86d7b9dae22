"""RefCOCO items against the official data set classes."""

import json

import numpy as np
import pytest

from lens_jax.data import images, prompts
from lens_jax.data.sources import Joined
from lens_jax.data.sources.refcoco import RefCoco, summed_mask

SAM_SIDE = 1024
SAM_MEAN, SAM_STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@pytest.fixture(scope="module")
def golden(golden_dir):
    items = json.loads((golden_dir / "datasets_golden.json").read_text())
    with np.load(golden_dir / "datasets_masks.npz") as masks:
        return items, dict(masks)


@pytest.fixture(scope="module")
def train(golden_dir):
    names = ("refcoco", "refcoco+", "refcocog")
    return Joined([RefCoco(golden_dir / "datasets", name, "train") for name in names])


def check_pictures(sample, item):
    height, width = images.smart_resize(*sample.image.shape[:2])
    assert [width, height] == item["image_size_wh"]
    llm = images.resize(sample.image, (height, width))
    # JPEG decoders differ by a grey level or two.
    assert abs(llm.mean() - item["llm_image"]["mean"]) < 0.5
    sam = (images.sam_pixels(sample.image, SAM_SIDE) - SAM_MEAN) / SAM_STD
    assert abs(sam.mean() - item["sam_image"]["mean"]) < 0.01
    return height, width


@pytest.mark.parametrize("coordinates", prompts.COORDINATES)
def test_training_items(golden, train, coordinates):
    items, masks = golden
    items = items[f"ReferSegDataset[{coordinates}]"]
    assert len(train) == len(items)
    for i, item in enumerate(items):
        sample = train[i]
        assert list(sample.expressions) == item["all_sentences"]
        assert sample.ref_id == item["ref_id"]
        assert sample.image_path.endswith(item["image_path"].lstrip("./"))
        np.testing.assert_array_equal(sample.mask, masks[f"refer_train_{i}"])
        resized = check_pictures(sample, item)
        scale = prompts.coordinate_scale(resized, coordinates)
        box = prompts.box_to_text(sample.box, sample.image.shape[:2], scale)
        assert list(box) == json.loads(item["solution"])
        assert prompts.Templates().messages(item["problem"]) == item["prompt"]


def evaluation_sets(items):
    """(data set, split, reasoning, items) of every RefCOCO evaluation set in the file."""
    for key, value in items.items():
        if key.startswith("ReferSegEvaluationSet["):
            name, *rest = key.removeprefix("ReferSegEvaluationSet[").rstrip("]").split(",")
            dataset, _, split = name.split(".")
            yield dataset, split, "cot" in rest, value


def test_evaluation_items(golden, golden_dir):
    items, masks = golden
    seen_overlap = False
    for dataset, split, reasoning, expected in evaluation_sets(items):
        source = RefCoco(golden_dir / "datasets", dataset, split)
        official = RefCoco(golden_dir / "datasets", dataset, split, official_masks=True)
        assert len(source) == len(expected)
        for i, item in enumerate(expected):
            sample, ref = source[i], source.refs[i]
            summed = summed_mask(ref.segmentation, *ref.size)
            assert list(summed.shape) == item["mask"]["shape"]
            assert summed.sum() == item["mask"]["sum"] and summed.max() == item["mask"]["max"]
            full = masks.get(f"{dataset}_{split}_{i}")
            if full is not None:
                np.testing.assert_array_equal(summed, full)
            np.testing.assert_array_equal(sample.mask, summed > 0)
            np.testing.assert_array_equal(official[i].mask, summed == 1)
            seen_overlap |= bool(summed.max() > 1)
            assert list(sample.expressions) == item["problems"]
            assert sample.image_id == item["image_id"]
            resized = check_pictures(sample, item)
            assert list(prompts.box_to_text(sample.box, ref.size, resized)) == item["box"]
            for expression, text in zip(item["problems"], item["texts"], strict=True):
                messages = prompts.Templates().messages(expression, reasoning)
                assert messages[1]["content"][1]["text"] in text
    assert seen_overlap
