"""What people's tools write, converted: read as it was meant, or left out with a sentence.

In every picture the object is a red square, and its mask must be red.
"""

import base64
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from lens_jax.data.sources.folder import Folder
from lens_jax.preparation.checking import check
from lens_jax.preparation.conversion import convert
from lens_jax.preparation.conversion.coco_boxes import form_of_boxes

WIDTH, HEIGHT = 56, 42
BOX = (10, 14, 30, 40)
FLAT = [10, 14, 30, 14, 30, 40, 10, 40]
CORNERS = [[10, 14], [30, 14], [30, 40], [10, 40]]
TURNS = {  # an upright picture to the stored one that the EXIF orientation turns back
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def scene(box=BOX, size=(WIDTH, HEIGHT)):
    picture = Image.new("RGB", size, "#787878")
    x0, y0, x1, y1 = box
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), fill="#d62c2c")
    return picture


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def stored(picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture, exif=exif)


def runs(mask):
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def mask():
    pixels = np.zeros((HEIGHT, WIDTH), bool)
    pixels[14:40, 10:30] = True
    return pixels


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content = encoded(content)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


GOOD = {"category_id": 1, "segmentation": [FLAT], "bbox": [10, 14, 20, 26], "area": 520}
GOOD |= {"iscrowd": 0}


def coco(data, *annotations, image=(), files=None, file="instances_train.json", **more):
    """Writes one picture, images/a.png, and annotations of it in COCO's form."""
    for name, content in (files or {"images/a.png": scene()}).items():
        put(data / name, content)
    images = [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT} | dict(image)]
    content = {
        "images": images,
        "annotations": [{"id": i, "image_id": 1} | a for i, a in enumerate(annotations, 1)],
        # Roboflow's tree: a root of the project's name, which nothing is annotated with.
        "categories": [
            {"id": 0, "name": "objects", "supercategory": "none"},
            {"id": 1, "name": "square", "supercategory": "objects"},
        ],
    }
    put(data / file, content | more)


def labelme(data, *shapes, files=None, file="a.json", **more):
    for name, content in (files or {"a.png": scene()}).items():
        put(data / name, content)
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": "a.png"}
    content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
    put(data / file, content | more)


def shape(kind, points, label="red square", **more):
    base = {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}}
    return base | more


def converted(layout, tmp_path, **options):
    """The summary, and how much of each row's mask is red."""
    summary = convert(layout, tmp_path / "data", tmp_path / "out", **options)
    if not summary.rows:
        return summary, []
    assert check(tmp_path / "out").unusable == 0
    fits = []
    for split in summary.rows:
        source = Folder(tmp_path / "out", split)
        for sample in (source[i] for i in range(len(source))):
            red = sample.image[..., 0].astype(int) - sample.image[..., 1] > 80
            x0, y0, x1, y1 = sample.box
            assert red[int(y0) : int(y1), int(x0) : int(x1)].all()
            fits.append((red & sample.mask).sum() / (red | sample.mask).sum())
    return summary, fits


def reasons(summary):
    return {reason: count for reason, count, _ in summary.left_out}


# ---- orientation and size ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("form", ["polygons", "rle", "box"])
def test_coco_lies_on_stored_pixels(orientation, form, tmp_path):
    annotation = dict(GOOD)
    if form == "rle":
        annotation["segmentation"] = runs(mask())
    elif form == "box":
        annotation["segmentation"] = []
    coco(tmp_path / "data", annotation, files={"images/a.png": stored(scene(), orientation)})
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0] and not summary.left_out
    assert ("turned upright with its picture", 1) in [row[:2] for row in summary.remarks]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_upright_annotations(orientation, tmp_path):
    """COCO where its size says so or, where both sizes fit, `info`; labelme, which shows pictures
    upright, with and without a size."""
    picture = stored(scene().transpose(TURNS[orientation]), orientation)
    info = {} if orientation > 4 else {"orientation": "upright"}
    coco(tmp_path / "coco" / "data", GOOD, files={"images/a.png": picture}, info=info)
    labelme(tmp_path / "sized" / "data", shape("polygon", CORNERS), files={"a.png": picture})
    sizes = {"imageHeight": None, "imageWidth": None}
    two = shape("rectangle", CORNERS[::2])
    labelme(tmp_path / "bare" / "data", two, files={"a.png": picture}, **sizes)
    for name, layout in (("coco", "coco"), ("sized", "labelme"), ("bare", "labelme")):
        summary, fits = converted(layout, tmp_path / name)
        assert fits == [1.0] and "turned" not in str(summary.remarks), name


@pytest.mark.parametrize("layout", ["coco", "labelme"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_resized_picture_is_left_out_or_scaled(layout, orientation, tmp_path):
    """Which way it is turned is decided first."""
    data, small = tmp_path / "data", scene().resize((WIDTH // 2, HEIGHT // 2))
    if layout == "coco":
        coco(data, GOOD, files={"images/a.png": stored(small, orientation)})
    else:
        upright = small if orientation == 1 else small.transpose(TURNS[orientation])
        labelme(data, shape("polygon", CORNERS), files={"a.png": stored(upright, orientation)})
    summary, _ = converted(layout, tmp_path)
    ((reason, count, text),) = summary.left_out
    assert (reason, count) == ("its picture was resized after it was annotated", 1)
    assert "28 x 21 pixels" in text and "says 56 x 42" in text and "--resized scale" in text
    summary, (fit,) = converted(layout, tmp_path, resized="scale")
    assert fit > 0.9 and "scaled to the size of its picture" in str(summary.remarks)


def test_scaling_every_form_and_not_what_was_cropped(tmp_path):
    files = {"images/a.png": scene((20, 28, 60, 80), (2 * WIDTH, 2 * HEIGHT))}
    data = tmp_path / "data"
    coco(data, GOOD | {"segmentation": runs(mask())}, GOOD | {"segmentation": []}, files=files)
    content = json.loads((data / "instances_train.json").read_text())
    for annotation in content["annotations"]:
        annotation["caption"] = "it"
    put(data / "instances_train.json", content)
    assert converted("coco", tmp_path, resized="scale")[1] == [1.0, 1.0]
    other = tmp_path / "other"
    coco(other / "data", GOOD, files={"images/a.png": scene(size=(WIDTH, WIDTH))})
    summary, _ = converted("coco", other, resized="scale")
    said = "its picture has other proportions than its annotation says"
    assert reasons(summary) == {said: 1}


# ---- COCO ----------------------------------------------------------------------------------------

PLACES = {
    "windows": {"image": {"file_name": "images\\a.png"}},
    "label studio": {"image": {"file_name": "images\\a.png"}, "file": "result.json"},
    "letters": {"image": {"file_name": "A.PNG"}},
    "cvat": {
        "files": {"images/default/a.png": scene()},
        "file": "annotations/instances_default.json",
    },
    "fiftyone": {"files": {"data/a.png": scene()}, "file": "labels.json"},
    "from the file": {
        "image": {"file_name": "../images/a.png"},
        "file": "annotations/instances_train.json",
    },
    "the split's": {
        "files": {"images/val/a.png": scene(), "images/train/a.png": scene((1, 1, 9, 9))},
        "file": "annotations/instances_val.json",
    },
    "accents": {
        "image": {"file_name": unicodedata.normalize("NFC", "é.png")},
        "files": {f"images/{unicodedata.normalize('NFD', 'é.png')}": scene()},
    },
    "id as text": {"image": {"id": "1"}},
    "id as fraction": {"image": {"id": 1.0}},
    "size as text": {"image": {"width": str(WIDTH), "height": str(HEIGHT)}},
    "no size": {"image": {"width": None, "height": None}},
    "VIA's size": {"image": {"width": 0, "height": 0}},
    "LVIS": {
        "image": {"file_name": None, "coco_url": "http://images.cocodataset.org/train2017/a.png"},
        "files": {"train2017/a.png": scene(), "val2017/a.png": scene((1, 1, 9, 9))},
        "file": "lvis_v1_train.json",
    },
    "LVIS, one folder": {
        "image": {"file_name": None, "coco_url": "http://images.cocodataset.org/train2017/a.png"},
    },
    "no split told": {
        "files": {"images/a.png": scene(), "train/a.png": scene((1, 1, 9, 9))},
        "file": "labels.json",
    },
    "no split told, a split's folder": {
        "files": {"train/a.png": scene()},
        "file": "labels.json",
    },
    "the same file twice": {
        "files": {"images/a.png": scene(), "data/a.png": scene()},
        "file": "labels.json",
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_pictures_are_found(name, tmp_path):
    coco(tmp_path / "data", GOOD, **PLACES[name])
    assert converted("coco", tmp_path)[1] == [1.0]


@pytest.mark.parametrize("places", [("images", "data"), ("train", "val"), ("images", ".")])
def test_pictures_of_one_name_that_nothing_tells_apart(places, tmp_path):
    files = {f"{places[0]}/a.png": scene(), f"{places[1]}/a.png": scene((1, 1, 9, 9))}
    coco(tmp_path / "data", GOOD, files=files, file="labels.json")
    summary, _ = converted("coco", tmp_path)
    assert reasons(summary) == {"several pictures have its name, and nothing tells which": 1}


def test_files_that_lie_deeper(tmp_path):
    files = {"export/train/a.png": scene()}
    coco(tmp_path, GOOD, files=files, file="export/train/_annotations.coco.json")
    with pytest.raises(
        FileNotFoundError, match=r"coco\.json lies deeper: give a deeper --data_dir"
    ):
        convert("coco", tmp_path, tmp_path / "out")


def test_files_that_lie_deeper_than_others(tmp_path):
    for file in ("instances_train.json", "more/annotations/instances_val.json"):
        coco(tmp_path / "data", GOOD, file=file)
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0] and reasons(summary) == {"the file lies deeper than files are read": 1}


def test_an_object_of_two_files_is_converted_once(tmp_path):
    """As COCO's person_keypoints repeat its instances; other sentences of it stay."""
    data = tmp_path / "data"
    coco(data, GOOD, file="annotations/instances_val2017.json")
    more = {"keypoints": [5, 5, 2], "num_keypoints": 1}
    coco(data, GOOD | more, file="annotations/person_keypoints_val2017.json")
    coco(data, GOOD | {"caption": "red"}, file="annotations/refs_val2017.json")
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0, 1.0] and reasons(summary) == {"another file holds the same object": 1}


def test_a_picture_that_is_listed_for_each_sentence(tmp_path):
    """MDETR's form of RefCOCO."""
    size = {"file_name": "a.png", "width": WIDTH, "height": HEIGHT}
    images = [{"id": i, "caption": f"sentence {i}"} | size for i in (1, 2)]
    coco(tmp_path / "data", GOOD, GOOD | {"image_id": 2}, images=images)
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0, 1.0] and not summary.left_out
    source = Folder(tmp_path / "out")
    assert [source[i].expressions for i in (0, 1)] == [("sentence 1",), ("sentence 2",)]


def test_crowds_and_brush_masks(tmp_path):
    """Datumaro calls every brush mask a crowd; COCO's own have no attributes."""
    crowd = GOOD | {"iscrowd": 1, "segmentation": runs(mask())}
    brush = crowd | {"attributes": {"occluded": False}}
    taken = "it is marked as a crowd: it was taken for one object"
    cases = {"crowd": (crowd, 0), "brush": (brush, 1), "text": (GOOD | {"iscrowd": "0"}, 1)}
    for name, (annotation, rows) in cases.items():
        coco(tmp_path / name / "data", annotation)
        summary, fits = converted("coco", tmp_path / name)
        assert fits == [1.0] * rows
        assert [row[0] for row in summary.remarks] == [taken] * (name == "brush")
    assert reasons(convert("coco", tmp_path / "crowd" / "data", tmp_path / "out")) == {
        "it is a crowd, not one object": 1
    }
    summary, fits = converted("coco", tmp_path / "crowd", crowds="keep")
    assert fits == [1.0] and summary.remarks[0][0] == taken


def test_sentences_as_objects(tmp_path):
    coco(tmp_path / "data", GOOD | {"captions": [{"caption": "red square"}, {"sent": "it"}]})
    assert converted("coco", tmp_path)[1] == [1.0]
    assert Folder(tmp_path / "out")[0].expressions == ("red square", "it")


AREAS = {  # x, y, third, fourth, area -> the form
    "corners": ((10, 14, 30, 40), 520, "xyxy"),
    "corners that are pixels": ((10, 14, 30, 40), 21 * 27, "xyxy"),
    "sizes": ((10, 14, 30, 40), 1200, "xywh"),
    "a mask larger than corners": ((10, 14, 30, 40), 700, "xywh"),
    "a mask that fits both": ((10, 14, 30, 40), 400, "auto"),
    "nearly the same": ((0, 1, 300, 400), 300 * 400, "auto"),
}


@pytest.mark.parametrize("name", AREAS)
def test_what_an_area_tells_of_a_box(name):
    box, area, form = AREAS[name]
    assert form_of_boxes([{"bbox": box, "area": area}], lambda _: (2000, 2000)) == form


def test_a_box_at_the_origin_has_one_reading(tmp_path):
    box = (0, 0, 30, 20)
    alone = {"category_id": 1, "bbox": box}
    coco(tmp_path / "data", alone, files={"images/a.png": scene(box)})
    assert converted("coco", tmp_path)[1] == [1.0]


def test_roboflow(tmp_path):
    for split in ("train", "valid", "test"):
        files = {f"{split}/a.png": scene()}
        coco(tmp_path / "data", GOOD, files=files, file=f"{split}/_annotations.coco.json")
    put(tmp_path / "data/train/._annotations.coco.json", b"\0\5\26\7")  # macOS leaves these
    summary, fits = converted("coco", tmp_path)
    assert summary.rows == {"train": 1, "val": 1, "test": 1} and fits == [1.0] * 3
    assert not summary.left_out and not summary.remarks


MASKS = {
    "flat": {"segmentation": FLAT},
    "corners": {"segmentation": CORNERS},
    "parts of corners": {"segmentation": [CORNERS]},
    "closed": {"segmentation": [[*FLAT, 10, 14]]},
    "run lengths": {"segmentation": runs(mask())},
    "a list of run lengths": {"segmentation": [runs(mask())] * 2},
    "box without area": {"bbox": [0, 0, 0, 0]},
    "no box": {"bbox": None},
    "corners as bbox": {"bbox": [10, 14, 30, 40]},
    "corners as bbox, run lengths": {"bbox": [10, 14, 30, 40], "segmentation": runs(mask())},
    "box alone": {"segmentation": []},
    "corners alone": {"segmentation": [], "bbox": [10, 14, 30, 40]},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_and_boxes(name, tmp_path):
    coco(tmp_path / "data", GOOD | MASKS[name])
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0] and not summary.left_out
    if "alone" in name:
        assert "it has a box alone: its mask is the filled box" in str(summary.remarks)
    if "corners a" in name and "run" not in name:
        assert "its bbox was read as [x0, y0, x1, y1]" in str(summary.remarks)


@pytest.mark.parametrize("parts", [[FLAT, [5, 5, 6, 6]], [[], FLAT], [[5, 5, 6, 6, 5, 5], FLAT]])
def test_slivers_are_dropped_and_counted(parts, tmp_path):
    coco(tmp_path / "data", GOOD | {"segmentation": parts})
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0]
    ((what, count, where),) = summary.remarks
    assert what == "parts of it with under three corners were dropped" and count == 1
    assert where.endswith("instances_train.json: annotation 1")


@pytest.mark.parametrize("part", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_broken_part_is_dropped(part, tmp_path):
    coco(tmp_path / "data", GOOD | {"segmentation": [FLAT, part]})
    summary, fits = converted("coco", tmp_path)
    assert fits == [1.0]
    assert [row[:2] for row in summary.remarks] == [
        ("parts of it with under three corners were dropped", 1)
    ]


def test_a_box_with_two_readings_takes_a_flag(tmp_path):
    alone = {"category_id": 1, "bbox": [10, 14, 30, 40]}
    coco(tmp_path / "data", alone, image={"width": None, "height": None})
    summary, _ = converted("coco", tmp_path)
    assert reasons(summary) == {
        "its bbox may be [x, y, width, height] or [x0, y0, x1, y1]": 1,
    }
    assert "--boxes xywh or --boxes xyxy" in summary.left_out[0][2]
    assert converted("coco", tmp_path, boxes="xyxy")[1] == [1.0]


BROKEN = {
    "fractions": (
        {"segmentation": [[v / 56 for v in FLAT]], "bbox": [0.2, 0.3, 0.3, 0.4], "area": 0.1},
        "its coordinates are fractions of the picture's size, not pixels",
    ),
    "fractions alone": (
        {"segmentation": [], "bbox": [0.2, 0.3, 0.3, 0.4], "area": None},
        "its coordinates are fractions of the picture's size, not pixels",
    ),
    "fractions as polygons": (
        {"segmentation": [[v / 56 for v in FLAT]]},
        "its coordinates are fractions of the picture's size, not pixels",
    ),
    "the whole picture in fractions": (
        {"segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]], "bbox": [0, 0, WIDTH, HEIGHT]},
        "its coordinates are fractions of the picture's size, not pixels",
    ),
    "fractions as box": (
        {"bbox": [0.2, 0.3, 0.3, 0.4]},
        "its coordinates are fractions of the picture's size, not pixels",
    ),
    "sliver": ({"segmentation": [[5, 5, 6, 6]]}, "its polygons have under three corners"),
    "odd": ({"segmentation": [[*FLAT, 3]]}, "its annotation is broken"),
    "text": ({"segmentation": [[str(v) for v in FLAT]]}, "its annotation is broken"),
    "far": ({"segmentation": [[0, 0, 1e6, 0, 5, 5]]}, "it lies outside the picture"),
    "nothing": ({"segmentation": [], "bbox": []}, "it has neither mask nor box"),
    "no area": ({"segmentation": [], "bbox": [0, 0, 0, 0]}, "its box has no area"),
    "keypoints": (
        {"segmentation": None, "bbox": None, "keypoints": [5, 5, 2]},
        "it has keypoints alone",
    ),
    "other size": (
        {"segmentation": {"size": [21, 28], "counts": [588]}},
        "its run lengths are for another size",
    ),
    "swapped size": ({"segmentation": runs(mask().T)}, "its run lengths are for another size"),
    "broken runs": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 5]}},
        "its mask is broken",
    ),
    "empty": (
        {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}},
        "its mask holds no pixel",
    ),
    "blank": ({"caption": " \u200b"}, "one of its sentences is empty, or no text"),
    "one blank": ({"sentences": ["red", ""]}, "one of its sentences is empty, or no text"),
    "number": ({"caption": 7}, "one of its sentences is empty, or no text"),
    "picture": ({"image_id": 9}, "its picture is not listed in the file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_left_out_of_coco(name, tmp_path):
    change, reason = BROKEN[name]
    coco(tmp_path / "data", GOOD | change)
    summary, _ = converted("coco", tmp_path)
    assert reasons(summary) == {reason: 1}
    assert "annotation 1" in summary.left_out[0][2]


def test_categories_name_what_they_alone_can_mean(tmp_path):
    """Not where one of that name, or of a category below it, is there twice."""
    far = {"segmentation": [[40, 1, 50, 1, 50, 9, 40, 9]], "bbox": [40, 1, 10, 8]}
    categories = [
        {"id": 1, "name": "square", "supercategory": "shape"},
        {"id": 2, "name": "shape", "supercategory": "none"},
        {"id": 3, "name": "square", "supercategory": "shape"},
    ]
    cases = {"below": (2, 1), "same name": (3, 0)}
    for name, (category, rows) in cases.items():
        data = tmp_path / name / "data"
        coco(data, GOOD, GOOD | far | {"category_id": category}, categories=categories)
        summary, fits = converted("coco", tmp_path / name)
        assert len(fits) == rows
        said = "it has no sentence, and its category is there twice"
        assert reasons(summary) == {said: 2 - rows}
    twice = tmp_path / "twice"
    images = [{"id": i, "file_name": "a.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)]
    coco(twice / "data", GOOD, GOOD | {"image_id": 2}, images=images)
    assert not converted("coco", twice)[1]
    images[1] |= {"id": 1, "file_name": "b.png"}
    coco(tmp_path / "ids" / "data", GOOD, images=images)
    summary, _ = converted("coco", tmp_path / "ids")
    assert reasons(summary) == {"its picture's id stands for several": 1}


def test_percent_are_noticed(tmp_path):
    part = [18.75, 33.3, 62.5, 33.3, 62.5, 87.5, 18.75, 87.5]
    annotation = {"category_id": 1, "segmentation": [part]}
    size = {"width": 640, "height": 480}
    files = {"images/a.png": Image.new("RGB", (640, 480))}
    coco(tmp_path / "data", annotation, image=size, files=files)
    summary = convert("coco", tmp_path / "data", tmp_path / "out")
    assert summary.remarks[0][:2] == ("no coordinate is over 100: they may be percent", 1)
    ((kind, count, text),) = check(tmp_path / "out").notes()
    assert (kind, count) == ("perhaps percent", 1) and "640 x 480" in text


def in_many(data, split, count, scale):
    """Pictures of 640 x 480, and an annotation of each, in pixels of it or in percent."""
    shown = {"width": 640, "height": 480}
    images, annotations = [], []
    for i in range(count):
        put(data / split / f"{i}.png", Image.new("RGB", (640, 480)))
        images.append({"id": i, "file_name": f"{i}.png"} | shown)
        x, y = scale
        x0, y0, x1, y1 = 20 * x, 30 * y, 65 * x, 100.00000000000001 * y
        part = [x0, y0, x1, y0, x1, y1, x0, y1]
        annotations.append({"id": i, "image_id": i, "category_id": 1, "segmentation": [part]})
    coco(data, files={"readme.txt": b""}, file=f"annotations/instances_{split}.json",
         images=images, annotations=annotations)  # fmt: skip


def test_a_file_in_percent_among_others(tmp_path):
    """Is left out, with its pictures; the flag keeps it, and few pictures prove nothing."""
    data = tmp_path / "data"
    in_many(data, "train", 3, (6.4, 4.8))
    in_many(data, "val", 5, (1, 1))
    summary = convert("coco", data, tmp_path / "out")
    said = "its coordinates are percent of the picture's sides, not pixels"
    assert reasons(summary) == {said: 5} and summary.rows == {"train": 3}
    assert "instances_val.json: annotation 0" in summary.left_out[0][2]
    assert summary.pictures == 3 and not summary.remarks
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert check(tmp_path / "out").unusable == 0
    summary = convert("coco", data, tmp_path / "all", coordinates="pixels")
    assert summary.rows == {"train": 3, "val": 5} and not summary.remarks
    in_many(tmp_path / "few", "val", 4, (1, 1))
    summary = convert("coco", tmp_path / "few", tmp_path / "noted")
    doubt = "no coordinate is over 100: they may be percent"
    assert summary.rows == {"val": 4} and summary.remarks[0][:2] == (doubt, 4)
    # What conversion keeps on request, the check keeps on request.
    report = check(tmp_path / "all")
    assert report.unusable == 5 and report.errors()[0][0] == "percent"
    assert check(tmp_path / "all", coordinates="pixels").unusable == 0


def test_labelme_in_percent(tmp_path):
    """Each picture has a file of its own: folders are judged."""
    for i in range(5):
        labelme(
            tmp_path / "data",
            shape("rectangle", [[20, 30], [65, 90]]),
            files={f"val/{i}.png": Image.new("RGB", (640, 480))},
            file=f"val/{i}.json",
            **{"imagePath": f"{i}.png", "imageHeight": 480, "imageWidth": 640},
        )
    labelme(tmp_path / "data", shape("polygon", CORNERS))
    summary = convert("labelme", tmp_path / "data", tmp_path / "out")
    said = "its coordinates are percent of the picture's sides, not pixels"
    assert reasons(summary) == {said: 5} and summary.rows == {"train": 1}


# ---- labelme -------------------------------------------------------------------------------------


def crop(height, width, kind=np.uint8):
    return base64.b64encode(encoded(Image.fromarray(np.ones((height, width), kind)))).decode()


SHAPES = {
    "two corners": shape("rectangle", CORNERS[2::-2]),
    "four corners": shape("rectangle", CORNERS),
    "four in any order": shape("rectangle", [CORNERS[i] for i in (0, 2, 1, 3)]),
    "five corners": shape("rectangle", [*CORNERS, CORNERS[0]]),
    "oriented": shape("oriented_rectangle", [CORNERS[i] for i in (3, 1, 0, 2)]),
    "rotation": shape("rotation", CORNERS, direction=0.0, attributes={}, difficult=False),
    "quadrilateral": shape("quadrilateral", CORNERS),
    "no kind": {"label": "red square", "points": CORNERS},
    "empty kind": shape("", CORNERS),
    "null kind": shape(None, CORNERS),
    "mask": shape("mask", [[10, 14], [29, 39]], mask=crop(26, 20)),
    "mask of bits": shape("mask", [[10, 14], [29, 39]], mask=crop(26, 20, bool)),
    "mask between pixels": shape("mask", [[10.2, 14.3], [29.4, 39.1]], mask=crop(26, 20)),
    "description": shape("polygon", CORNERS, "", description="the red square"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, tmp_path):
    labelme(tmp_path / "data", SHAPES[name])
    summary, fits = converted("labelme", tmp_path)
    assert fits == [1.0] and not summary.left_out and not summary.remarks


def test_a_rotated_rectangle(tmp_path):
    points = [[20, 5], [30, 15], [20, 25], [10, 15]]
    for i, order in enumerate(((0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 2, 1))):
        case = tmp_path / str(i)
        labelme(case / "data", shape("rectangle", [points[k] for k in order]))
        convert("labelme", case / "data", case / "out")
        assert 180 < Folder(case / "out")[0].mask.sum() < 220


def test_groups(tmp_path):
    """Masks and polygons of one group are one object; what has no area is dropped from it."""
    half = [[20, 14], [30, 14], [30, 40], [20, 40]]
    shapes = [
        shape("mask", [[10, 14], [19, 39]], mask=crop(26, 10), group_id=1),
        shape("polygon", half, group_id=1),
        shape("polygon", half[:2], group_id=1),
        shape("point", [[12, 20]], group_id=1),
    ]
    labelme(tmp_path / "data", *shapes)
    summary, fits = converted("labelme", tmp_path)
    assert fits == [1.0] and summary.rows == {"train": 1}
    assert [row[:2] for row in summary.remarks] == [
        ("points or lines of its group were dropped", 1),
        ("parts of it with under three corners were dropped", 1),
    ]


LEFT_OUT = {
    "point": (shape("point", [[12, 20]]), "a point has no area"),
    "points": (shape("points", CORNERS), "points have no area"),
    "line": (shape("line", CORNERS[:2]), "a line has no area"),
    "linestrip": (shape("linestrip", CORNERS), "a line of several parts has no area"),
    "cuboid": (shape("cuboid", CORNERS), "it is a kind of shape that is not known"),
    "two corners": (shape("polygon", CORNERS[:2]), "its polygons have under three corners"),
    "no label": (shape("polygon", CORNERS, None), "it has no label"),
    "blank label": (shape("polygon", CORNERS, " "), "it has no label"),
    "number": (shape("polygon", CORNERS, 3), "one of its sentences is empty, or no text"),
    "ignored": (shape("polygon", CORNERS, "__ignore__"), "it is labelled __ignore__"),
    "no points": ({"label": "x", "shape_type": "polygon"}, "its annotation is broken"),
    "three corners": (shape("rectangle", CORNERS[:3]), "its annotation is broken"),
    "mask's size": (
        shape("mask", [[10, 14], [29, 39]], mask=crop(9, 9)),
        "its annotation is broken",
    ),
    "no mask": (shape("mask", [[10, 14], [29, 39]], mask=None), "its annotation is broken"),
    "fractions": (
        shape("polygon", [[x / WIDTH, y / HEIGHT] for x, y in CORNERS]),
        "its coordinates are fractions of the picture's size, not pixels",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_of_labelme(name, tmp_path):
    bad, reason = LEFT_OUT[name]
    labelme(tmp_path / "data", bad, shape("polygon", CORNERS))
    summary, fits = converted("labelme", tmp_path)
    assert fits == [1.0] and reasons(summary) == {reason: 1}
    assert summary.left_out[0][2].partition("a.json: ")[2].startswith("shape 0")


PNG = base64.b64encode(encoded(scene())).decode()
BESIDE = {
    "data": {"files": {"readme.txt": b""}, "imageData": PNG},
    "data uri": {"files": {"readme.txt": b""}, "imageData": f"data:image/png;base64,{PNG}"},
    "lines, no padding": {
        "files": {"readme.txt": b""},
        "imageData": "\n".join(PNG[i : i + 76] for i in range(0, len(PNG), 76)).rstrip("="),
    },
    "another folder": {
        "files": {"pictures/a.png": scene()},
        "file": "json/a.json",
        "imagePath": "..\\pictures\\a.png",
    },
    "a large ending": {"files": {"a.PNG": scene()}, "imagePath": "C:\\photos\\a.bmp"},
    "a bitmap that is gone": {"files": {"a.png": scene()}, "imagePath": "b.bmp"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_labelme_pictures_are_found(name, tmp_path):
    labelme(tmp_path / "data", shape("polygon", CORNERS), **BESIDE[name])
    assert converted("labelme", tmp_path)[1] == [1.0]


def test_image_data_tells_the_size_that_is_not_stated(tmp_path):
    """labelme 3's form."""
    bare = {"imageHeight": None, "imageWidth": None, "imageData": PNG}
    labelme(tmp_path / "same" / "data", shape("polygon", CORNERS), **bare)
    assert converted("labelme", tmp_path / "same")[1] == [1.0]
    files = {"a.png": scene().resize((WIDTH // 2, HEIGHT // 2))}
    labelme(tmp_path / "data", shape("polygon", CORNERS), files=files, **bare)
    summary, _ = converted("labelme", tmp_path)
    assert reasons(summary) == {"its picture was resized after it was annotated": 1}
    assert converted("labelme", tmp_path, resized="scale")[1][0] > 0.9


def test_image_data_of_another_picture(tmp_path):
    """A turned file is another picture; one that is encoded anew is none."""
    other = scene().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    files = {"a.png": other}
    labelme(tmp_path / "data", shape("polygon", CORNERS), files=files, imageData=PNG)
    summary, _ = converted("labelme", tmp_path)
    assert reasons(summary) == {"its imageData shows another picture than its file": 1}
    again = {"a.jpg": encoded(scene(), "JPEG", quality=60)}
    more = {"imageData": PNG, "imagePath": "a.jpg"}
    labelme(tmp_path / "jpeg" / "data", shape("polygon", CORNERS), files=again, **more)
    assert convert("labelme", tmp_path / "jpeg" / "data", tmp_path / "out").rows == {"train": 1}


@pytest.mark.parametrize("data", ["no base64!", base64.b64encode(b"text").decode(), 5, PNG[:80]])
def test_image_data_that_is_no_picture(data, tmp_path):
    files = {"readme.txt": b""}
    labelme(tmp_path / "data", shape("polygon", CORNERS), files=files, imageData=data)
    summary, _ = converted("labelme", tmp_path)
    ((reason, count, text),) = summary.left_out
    assert reason in ("its imageData is no picture", "its picture cannot be read")
    assert count == 1 and "a.json: shape 0" in text and "_io" not in text


# ---- safety --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/{}", "../{}", "images/../../{}", "..\\{}", "x/../../{}"])
@pytest.mark.parametrize("layout", ["coco", "labelme"])
def test_no_name_leads_out_of_the_data_set(layout, name, tmp_path):
    put(tmp_path / "secret.png", scene())
    name = name.format("secret.png" if name[0] != "/" else str(tmp_path)[1:] + "/secret.png")
    data = tmp_path / "data"
    if layout == "coco":
        coco(data, GOOD, image={"file_name": name}, files={"images/b.png": scene()})
    else:
        shapes = [shape("polygon", CORNERS)]
        labelme(data, *shapes, imagePath=name, files={"images/b.png": scene()})
    summary, _ = converted(layout, tmp_path)
    assert not (tmp_path / "out").exists()
    (reason,) = reasons(summary)
    # From one of the places where COCO's pictures lie, a name may stay inside, and name nothing.
    allowed = {"the name of its picture leads out of the data set"}
    assert reason in allowed | ({"its picture is missing"} if layout == "coco" else set())


@pytest.mark.parametrize("layout", ["coco", "labelme"])
def test_links_and_files_that_are_no_pictures(layout, tmp_path):
    """A folder of pictures may be a link, a picture's own may not lead out of the data set; and no
    file is copied that cannot be decoded."""
    write = {
        "coco": lambda data, files: coco(data, GOOD, files=files),
        "labelme": lambda data, files: labelme(data, shape("polygon", CORNERS), files=files),
    }[layout]
    place = "images/a.png" if layout == "coco" else "a.png"
    put(tmp_path / "elsewhere" / "a.png", scene())
    for name, target in (("out", tmp_path / "elsewhere" / "a.png"), ("in", "b.png")):
        data = tmp_path / name / "data"
        write(data, {place.replace("a.png", "b.png"): scene()})
        (data / place).symlink_to(target)
        summary, fits = converted(layout, tmp_path / name)
        if name == "in":
            assert fits == [1.0]
            continue
        said = "its picture is a link that leads out of the data set"
        assert reasons(summary) == {said: 1} and "cp -rL" in summary.left_out[0][2]
    write(tmp_path / "text" / "data", {place: b"a secret text"})
    summary, _ = converted(layout, tmp_path / "text")
    assert reasons(summary) == {"its picture cannot be read": 1}
    if layout == "coco":
        write(tmp_path / "folder" / "data", {"x.txt": b""})
        (tmp_path / "folder" / "data" / "images").symlink_to(tmp_path / "elsewhere")
        assert converted(layout, tmp_path / "folder")[1] == [1.0]


def test_texts_of_every_encoding(tmp_path):
    content = {"shapes": [shape("polygon", CORNERS, "红")], "imagePath": "a.png"}
    text = json.dumps(content, ensure_ascii=False)
    put(tmp_path / "data" / "a.png", scene())
    for name, encoding in (("a", "utf-8-sig"), ("b", "utf-16"), ("c", "gbk")):
        put(tmp_path / "data" / f"{name}.json", text.encode(encoding))
    summary, fits = converted("labelme", tmp_path)
    assert fits == [1.0, 1.0]
    ((reason, count, said),) = summary.left_out
    assert (reason, count) == ("the file is not in labelme's form", 1) and "not UTF-8" in said
    assert Folder(tmp_path / "out")[1].expressions == ("红",)
