"""Other layouts written as a manifest: the samples stay the same, and nothing gets lost unseen."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.sources.folder import Folder
from lens_jax.data.sources.reason_seg import ReasonSeg
from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.preparation.checking import check
from lens_jax.preparation.conversion import convert

SQUARE = [[8, 5], [20, 5], [20, 12], [8, 12]]
FLAT = [8, 5, 20, 5, 20, 12, 8, 12]
MASK = np.zeros((30, 40), bool)
MASK[5:12, 8:20] = True


def picture(file, size=(40, 30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (80, 90, 100)).save(file)


def left_out(summary):
    return {reason: count for reason, count, _ in summary.left_out}


def test_refcoco(shapes_dir, tmp_path):
    summary = convert("refcoco", shapes_dir, tmp_path / "out")
    assert not summary.left_out and summary.pictures == 70
    for split in ("train", "val", "testA", "testB"):
        before, after = RefCoco(shapes_dir, "refcoco", split), Folder(tmp_path / "out", split)
        assert len(before) == len(after) == summary.rows[split]
        for i in range(0, len(before), 7):
            old, new = before[i], after[i]
            assert old.expressions == new.expressions
            np.testing.assert_array_equal(old.image, new.image)
            np.testing.assert_array_equal(old.mask, new.mask)
            np.testing.assert_allclose(old.box, new.box)
    report = check(tmp_path / "out")
    assert report.unusable == 0 and not report.errors()
    linked = next((tmp_path / "out").rglob("*.jpg"))
    assert linked.stat().st_nlink > 1


def test_refclef(shapes_dir, tmp_path):
    """REFER's layout with pictures of its own."""
    root = tmp_path / "data" / "refer_seg"
    shutil.copytree(shapes_dir / "refer_seg" / "refcoco", root / "refclef")
    images = root / "images" / "saiapr_tc-12"
    shutil.copytree(shapes_dir / "refer_seg/images/mscoco/images/train2014", images)
    before = RefCoco(shapes_dir, "refcoco", "val")
    source = RefCoco(tmp_path / "data", "refclef", "val")
    assert source[0].image_path.startswith(str(images)) and len(source) == len(before)
    np.testing.assert_array_equal(source[3].mask, before[3].mask)
    summary = convert("refcoco", tmp_path / "data", tmp_path / "out", dataset="refclef")
    assert summary.rows["val"] == len(source)


def test_reason_seg(tmp_path):
    root = tmp_path / "data" / "reason_seg" / "ReasonSeg"
    shapes = {
        "train/a": [("target", SQUARE), ("ignore", [[10, 6], [12, 6], [12, 8]])],
        "val/b": [("ignore", SQUARE)],
        "val/c": [("target", SQUARE)],
    }
    for name, polygons in shapes.items():
        picture(root / f"{name}.jpg")
        labels = [{"label": label, "points": points} for label, points in polygons]
        content = {"text": ["what is it", "and why"], "shapes": labels}
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "val" / "c.jpg").write_bytes(b"\xff\xd8")
    (root / "val" / "d.json").write_text("{")
    summary = convert("reason_seg", tmp_path / "data", tmp_path / "out")
    assert summary.rows == {"train": 1, "val": 1}
    assert left_out(summary) == {
        "its picture or a polygon cannot be read": 1,
        "its annotation is broken": 1,
    }
    old, new = ReasonSeg(tmp_path / "data")[0], Folder(tmp_path / "out")[0]
    np.testing.assert_array_equal(old.mask, new.mask)
    assert new.expressions == ("what is it", "and why")
    no_target = Folder(tmp_path / "out", "val")[0]
    assert no_target.box is None and not no_target.mask.any()


def test_reason_seg_in_percent(tmp_path):
    root = tmp_path / "data" / "reason_seg" / "ReasonSeg" / "val"
    part = [[20, 30], [65, 30], [65, 90]]
    for i in range(5):
        picture(root / f"{i}.jpg", (640, 480))
        content = {"text": ["it"], "shapes": [{"label": "target", "points": part}]}
        (root / f"{i}.json").write_text(json.dumps(content))
    summary = convert("reason_seg", tmp_path / "data", tmp_path / "out")
    assert left_out(summary) == {
        "its coordinates are percent of the picture's sides, not pixels": 5
    }
    kept = convert("reason_seg", tmp_path / "data", tmp_path / "out", coordinates="pixels")
    assert kept.rows == {"val": 5}


def test_coco(tmp_path):
    data = tmp_path / "data"
    for name in "abcd":
        picture(data / "images" / "val2017" / f"{name}.jpg")
    annotation = {"segmentation": [FLAT], "bbox": [8, 5, 12, 7], "category_id": 1}
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "width": 40, "height": 30}
            for i, name in enumerate("abcde")
        ],
        "categories": [{"id": 1, "name": "cup"}],
        "annotations": [
            annotation | {"id": 1, "image_id": 0, "sentences": [{"sent": "left"}, {"raw": "Cup"}]},
            annotation | {"id": 2, "image_id": 0, "caption": "the cup"},
            annotation | {"id": 3, "image_id": 1},
            annotation | {"id": 4, "image_id": 2},
            annotation | {"id": 5, "image_id": 2},
            annotation | {"id": 6, "image_id": 0, "iscrowd": 1},
            annotation | {"id": 7, "image_id": 9, "caption": "lost"},
            annotation | {"id": 8, "image_id": 4, "caption": "no file"},
            {"id": 9, "image_id": 3, "bbox": [8, 5, 12, 7], "expressions": ["box alone"]},
            {"id": 10, "image_id": 3, "caption": 3, "bbox": [8, 5, 12, 7]},
        ],
    }
    file = data / "annotations" / "instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(content))
    summary = convert("coco", data, tmp_path / "out")
    assert summary.rows == {"val": 4}
    assert left_out(summary) == {
        "it has no sentence, and its category is there twice": 2,
        "one of its sentences is empty, or no text": 1,
        "it is a crowd, not one object": 1,
        "its picture is not listed in the file": 1,
        "its picture is missing": 1,
    }
    source = Folder(tmp_path / "out", "val")
    said = [sample.expressions for sample in (source[i] for i in range(4))]
    assert said == [("left", "Cup"), ("the cup",), ("cup",), ("box alone",)]
    for i in range(4):
        np.testing.assert_array_equal(source[i].mask, MASK)
        assert source[i].box.tolist() == [8, 5, 20, 12]
    content["annotations"] = [annotation | {"id": 1, "image_id": 0}]
    content["images"][0]["caption"] = "said of the picture"
    file.write_text(json.dumps(content))
    convert("coco", data, tmp_path / "other")
    assert Folder(tmp_path / "other", "val")[0].expressions == ("said of the picture",)


def test_labelme(tmp_path):
    data = tmp_path / "data"
    picture(data / "train" / "a.png")
    picture(data / "elsewhere.png")
    inside = base64.b64encode((data / "train" / "a.png").read_bytes()).decode()
    shapes = [
        {"label": "cup", "points": SQUARE, "shape_type": "polygon", "description": "a blue one"},
        {"label": "plate", "points": [[20, 12], [8, 5]], "shape_type": "rectangle"},
        {"label": "ball", "points": [[20, 15], [20, 23]], "shape_type": "circle"},
        {"label": "pair", "points": SQUARE, "group_id": 1},
        {"label": "pair", "points": [[30, 20], [40, 30]], "shape_type": "rectangle", "group_id": 1},
        {"label": "line", "points": [[1, 2], [3, 4]], "shape_type": "line"},
        {"label": "", "points": SQUARE},
        {"label": "odd", "points": [[1, 2, 3]]},
    ]
    files = {
        "train/a.json": {"imagePath": "C:\\photos\\a.png", "shapes": shapes},
        "val/b.json": {"imagePath": "b.png", "imageData": inside, "shapes": shapes[:1]},
        "val/c.json": {"imagePath": "../elsewhere.png", "shapes": shapes[:1]},
        "val/d.json": {"imagePath": "d.png", "shapes": shapes[:2]},
        "notes.json": [],
    }
    for name, content in files.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(json.dumps(content))
    summary = convert("labelme", data, tmp_path / "out")
    assert summary.rows == {"train": 4, "val": 2} and summary.pictures == 3
    assert left_out(summary) == {
        "a line has no area": 1,
        "it has no label": 1,
        "its annotation is broken": 1,
        "its picture is missing": 2,
        "the file is not in labelme's form": 1,
    }
    train, val = Folder(tmp_path / "out"), Folder(tmp_path / "out", "val")
    assert train[0].expressions == ("cup", "a blue one")
    np.testing.assert_array_equal(train[0].mask, MASK)
    np.testing.assert_array_equal(train[1].mask, MASK)
    assert abs(train[2].mask.sum() - np.pi * 64) < 8
    pair = MASK.copy()
    pair[20:, 30:] = True
    np.testing.assert_array_equal(train[3].mask, pair)
    assert [val[i].image.shape for i in range(2)] == [(30, 40, 3)] * 2
    assert check(tmp_path / "out").unusable == 0


def test_all_or_nothing(shapes_dir, tmp_path):
    (tmp_path / "out").mkdir()
    for layout in ("refcoco", "reason_seg", "coco", "labelme"):
        with pytest.raises(FileNotFoundError):
            convert(layout, tmp_path / "out", tmp_path / "out2")
    assert os.listdir(tmp_path) == ["out"]

    def stop(items):
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("refcoco", shapes_dir, tmp_path / "out", progress=stop)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")
    convert("refcoco", shapes_dir, tmp_path / "out")
    with pytest.raises(FileExistsError, match="out exists already"):
        convert("refcoco", shapes_dir, tmp_path / "out")


def test_names_that_are_no_unicode(tmp_path):
    data = tmp_path / "data"
    picture(data / "a.png")
    name = os.fsdecode(b"b\xff")
    picture(data / f"{name}.png")
    for stem in ("a", name):
        content = {"imagePath": "none.png", "shapes": [{"label": "it", "points": SQUARE}]}
        (data / f"{stem}.json").write_text(json.dumps(content))
    summary = convert("labelme", data, tmp_path / "out")
    assert summary.rows == {"train": 1}
    ((_, count, text),) = summary.left_out
    assert count == 1 and "b\\udcff.json" in text and text.encode()
    (data / "a.json").unlink()
    assert not convert("labelme", data, tmp_path / "none").rows
    assert not (tmp_path / "none").exists()


def test_pictures_of_one_name_stay_apart(tmp_path):
    data = tmp_path / "data"
    for i, place in enumerate(("x/a.png", "y/a.png")):
        picture(data / place, (40, 30 + i))
        content = {"imagePath": f"../{place}", "shapes": [{"label": "it", "points": SQUARE}]}
        (data / "json").mkdir(exist_ok=True)
        (data / "json" / f"{i}.json").write_text(json.dumps(content))
    assert convert("labelme", data, tmp_path / "out").pictures == 2
    source = Folder(tmp_path / "out")
    assert [source[i].image.shape[0] for i in range(2)] == [30, 31]
