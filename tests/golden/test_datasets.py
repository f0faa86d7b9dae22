"""Items of all data sets against the official classes: texts, boxes, masks, pictures."""

import json

import numpy as np
import pytest

from lens_jax.data import curriculum, images, prompts
from lens_jax.data.sources import Joined
from lens_jax.data.sources.grounding_suite import GroundingSuite
from lens_jax.data.sources.reason_seg import ReasonSeg, label_map
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
    """Size and grey levels; returns the size that the text's coordinates run to."""
    picture = sample.image
    if sample.longest_side is not None:
        picture = images.resize(
            picture, images.longest_side(*picture.shape[:2], sample.longest_side)
        )
    size = images.smart_resize(*picture.shape[:2])
    width, height = item["image_size_wh"]
    # The official evaluation of ReasonSeg leaves the second resize to the image processor.
    assert (height, width) in (size, picture.shape[:2])
    llm = images.resize(picture, (height, width))
    # JPEG decoders differ by a grey level or two.
    assert abs(llm.mean() - item["llm_image"]["mean"]) < 0.5
    square = images.sam_pixels(sample.image, SAM_SIDE, sample.antialias)
    sam = ((square - SAM_MEAN) / SAM_STD).transpose(2, 0, 1)
    assert abs(sam.mean() - item["sam_image"]["mean"]) < 1e-3
    np.testing.assert_allclose(sam[:, ::256, ::256].ravel(), item["sam_sample"], atol=0.05)
    return size


def check_questions(item, reasoning=False):
    for expression, text in zip(item["problems"], item["texts"], strict=True):
        messages = prompts.Templates().messages(expression, reasoning)
        assert messages[1]["content"][1]["text"] in text


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


def test_curriculum(golden, golden_dir):
    """Which objects the official curriculum takes, in which order."""
    items, _ = golden
    (items,) = (value for key, value in items.items() if key.startswith("ReferSegCLDataset["))
    names = ("refcoco", "refcoco+", "refcocog")
    folder = golden_dir / "datasets"
    chosen = curriculum.easy_first(
        [RefCoco(folder, name, "train") for name in names],
        [curriculum.read_rewards(folder / "refer_seg" / n / "curriculum.json", n) for n in names],
    )
    assert len(chosen) == len(items) > 0
    for sample, item in zip(chosen, items, strict=True):
        assert item["problem"] in sample.expressions
        assert sample.image_path.endswith(item["image_path"].lstrip("./"))
        assert sample.mask.sum() == item["mask"]["sum"]


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
            check_questions(item, reasoning)
    assert seen_overlap


@pytest.mark.parametrize("coordinates", prompts.COORDINATES)
@pytest.mark.parametrize("dataset", ["ReasonSeg", "GroundingSuite"])
def test_training_items_of_other_sets(golden, golden_dir, dataset, coordinates):
    items, masks = golden
    (key,) = (k for k in items if k.startswith(f"{dataset}Dataset[{coordinates}"))
    classes = {"ReasonSeg": ReasonSeg, "GroundingSuite": GroundingSuite}
    masks_of = {"ReasonSeg": "reason_train", "GroundingSuite": "gs"}[dataset]
    source = classes[dataset](golden_dir / "datasets")
    assert len(source) == len(items[key]) > 0
    for i, item in enumerate(items[key]):
        sample = source[i]
        assert item["problem"] in sample.expressions
        assert len(sample.expressions) == source.num_expressions[i]
        assert sample.image_path.endswith(item["image_path"].lstrip("./"))
        np.testing.assert_array_equal(sample.mask, masks[f"{masks_of}_{i}"])
        scale = prompts.coordinate_scale(check_pictures(sample, item), coordinates)
        solution = item["solution"]
        solution = json.loads(solution) if isinstance(solution, str) else solution
        assert list(prompts.box_to_text(sample.box, sample.image.shape[:2], scale)) == solution
        reasoning = "<think>" in item["text"]
        assert prompts.Templates().messages(item["problem"], reasoning) == item["prompt"]


def test_reason_seg_evaluation_items(golden, golden_dir):
    items, masks = golden
    keys = [key for key in items if key.startswith("ReasonSegVal[")]
    assert keys
    for key in keys:
        asked, split = key.removeprefix("ReasonSegVal[").rstrip("]").split("->")
        source = ReasonSeg(golden_dir / "datasets", split, evaluation=True)
        assert len(source) == len(items[key]) == sum(source.num_expressions)
        for i, item in enumerate(items[key]):
            sample = source[i]
            assert list(sample.expressions) == item["problems"]
            assert sample.box is None and item["box"] == []
            np.testing.assert_array_equal(sample.mask, masks[f"reason_{split}_{i}"])
            check_pictures(sample, item)
            check_questions(item, reasoning=asked == "cot")


def test_reason_seg_labels(golden, golden_dir):
    """Targets and what is to be ignored, before the latter becomes background."""
    _, masks = golden
    seen = set()
    for split in ("train", "val", "test"):
        source = ReasonSeg(golden_dir / "datasets", split)
        for annotation, sample in zip(source.annotations, source, strict=True):
            stored = masks.get(f"reason_rawlabels_{annotation.image.stem}")
            if stored is not None:
                labels = label_map(annotation, *sample.mask.shape)
                np.testing.assert_array_equal(labels, stored)
                seen |= set(np.unique(labels).tolist())
    assert seen == {0, 1, 255}


def test_grounding_suite_evaluation_items(golden, golden_dir):
    items, masks = golden
    source = GroundingSuite(golden_dir / "datasets", evaluation=True)
    items = items["GroundingSuiteEvalDataset"]
    assert len(source) == len(items)
    for i, item in enumerate(items):
        sample = source[i]
        assert list(sample.expressions) == item["problems"]
        np.testing.assert_array_equal(sample.mask, masks[f"gs_{i}"])
        resized = check_pictures(sample, item)
        assert list(prompts.box_to_text(sample.box, sample.mask.shape, resized)) == item["box"]
        check_questions(item)
