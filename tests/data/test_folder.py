"""A data set of one's own: what its rows may say, what is derived, and what is refused."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lens_jax.data.buckets import Buckets
from lens_jax.data.evaluation_batches import Evaluation
from lens_jax.data.masks import decode_runs, draw_polygons
from lens_jax.data.pipeline import Pipeline
from lens_jax.data.sample import SampleError, read_image, to_rgb
from lens_jax.data.sources import open_source
from lens_jax.data.sources.folder import Folder, RowError

WIDTH, HEIGHT = 40, 30
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[5:12, 8:20] = True
POLYGON = [8, 5, 20, 5, 20, 12, 8, 12]
BOX = [8, 5, 20, 12]


@pytest.fixture
def write(tmp_path):
    """Writes a manifest, with a picture and a mask to refer to; returns data_dir."""
    Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 60)).save(tmp_path / "a.png")
    Image.fromarray(MASK.astype(np.uint8) * 255).save(tmp_path / "mask.png")

    def write(*rows):
        lines = [
            row
            if isinstance(row, str)
            else json.dumps({"image": "a.png", "expressions": ["it"]} | row)
            for row in rows
        ]
        (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
        return tmp_path

    return write


def rle(mask, compressed):
    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return {"size": list(mask.shape), "counts": runs["counts"].decode()}
    flat = mask.reshape(-1, order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    counts = np.diff(edges, prepend=0, append=mask.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}


def test_every_form_of_a_mask_is_the_same_sample(write):
    pairs = [[POLYGON[i], POLYGON[i + 1]] for i in range(0, 8, 2)]
    forms = [
        {"mask": "mask.png"},
        {"polygons": [POLYGON]},
        {"polygons": [pairs]},
        {"polygons": [[8, 5, 14, 5, 14, 12, 8, 12], [14, 5, 20, 5, 20, 12, 14, 12]]},
        {"rle": rle(MASK, True)},
        {"rle": rle(MASK, False)},
        {"box": BOX},
        {"mask": "mask.png", "box": BOX, "polygons": None, "split": "train"},
    ]
    source = open_source("folder", "train", write(*forms))
    assert len(source) == len(forms) and list(source.num_expressions) == [1] * len(forms)
    for i in range(len(forms)):
        sample = source[i]
        np.testing.assert_array_equal(sample.mask, MASK, err_msg=str(forms[i]))
        assert sample.box.tolist() == BOX and sample.expressions == ("it",)
        assert sample.ref_id == i + 1 and sample.image[0, 0].tolist() == [200, 30, 60]


def test_a_given_box_stays_and_is_cut_at_the_border(write):
    source = Folder(write({"mask": "mask.png", "box": [-3, 4.5, 19, 99]}, {"box": [30, -9, 99, 2]}))
    assert source[0].box.tolist() == [0, 4.5, 19, 30]
    assert source[1].box.tolist() == [30, 0, 40, 2]
    assert source[1].mask.sum() == 20 and source[1].mask[:2, 30:].all()


def test_a_box_fills_the_pixels_whose_centres_it_holds(write):
    sample = Folder(write({"box": [2.6, 1.4, 5.5, 3.9]}))[0]
    ys, xs = np.nonzero(sample.mask)
    assert (set(xs), set(ys)) == ({3, 4}, {1, 2, 3}) and len(xs) == 6
    assert sample.box.tolist() == [2.6, 1.4, 5.5, 3.9]


def test_splits_and_several_objects_of_a_picture(write):
    rows = [
        {"expressions": ["a", "b", "c"], "box": BOX},
        {"box": BOX, "split": "val"},
        {"box": [0, 0, 4, 4], "expressions": ["Größe 图"]},
    ]
    train, val = (Folder(write(*rows), split) for split in ("train", "val"))
    assert (train.num_expressions, val.num_expressions) == ([3, 1], [1])
    assert train[0].image_id == train[1].image_id and train[0].ref_id != train[1].ref_id
    assert train[1].expressions == ("Größe 图",)
    with pytest.raises(ValueError, match=r"split: 'test' is none of train, val in .*eval_split"):
        Folder(write(*rows), "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere/manifest\.jsonl is missing"):
        Folder("nowhere")


def test_no_target(write, processor):
    """No box in the answer that is taught; zeros and an empty mask for the rewards."""
    source = Folder(write({"box": None}, {"mask": None}, {"box": BOX}))
    for sample in (source[0], source[1]):
        assert sample.box is None and not sample.mask.any()
        example = processor.example(sample, "it")
        assert example.box.tolist() == [0, 0, 0, 0] and not example.mask.any()
        text = processor.tokenizer.decode(example.answer)
        assert text == "<|object_ref_start|>it.<|object_ref_end|><|im_end|>"
    assert "<|box_start|>" in processor.tokenizer.decode(processor.example(source[2], "it").answer)


NOT_ROWS = [
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    ('{"a": ' * 100_000, "nested too deeply"),
    ('{"image": "a.png", "expressions": ["it"], "box": [1, 2, 3, ' + "9" * 5000 + "]}", "not JSON"),
    ({"split": 3, "box": BOX}, "split must be a name, not 3"),
]
BAD_ROWS = [
    ({}, "no mask, no box", "give mask, polygons, rle or box"),
    ({"image": None, "box": BOX}, "wrong type", "image must be"),
    ({"image": "/a.png", "box": BOX}, "bad name", "image: '/a.png' leads out of"),
    ({"image": "../a.png", "box": BOX}, "bad name", "leads out of"),
    ({"image": "..\\a.png", "box": BOX}, "bad name", "leads out of"),
    ({"image": "C:/a.png", "box": BOX}, "bad name", "leads out of"),
    ({"image": "\udcff.png", "box": BOX}, "wrong type", "in Unicode"),
    ({"image": "a\0.png", "box": BOX}, "wrong type", "image must be"),
    ({"image": "b.png", "box": BOX}, "unreadable picture", r"b\.png: no such picture"),
    ({"image": ".", "box": BOX}, "unreadable picture", "not a readable picture"),
    ({"image": "x" * 999, "box": BOX}, "unreadable picture", "not a readable picture"),
    ({"image": "x" * 5000, "box": BOX}, "bad name", "image must be a file's name"),
    ({"expressions": "it", "box": BOX}, "wrong type", "a list of one or more sentences"),
    ({"expressions": [], "box": BOX}, "wrong type", "a list of one or more sentences"),
    ({"expressions": ["it", 3], "box": BOX}, "no sentence", "must be text, not 3"),
    ({"expressions": ["it", " "], "box": BOX}, "no sentence", "is empty"),
    ({"expressions": ["\u200b\ufeff"], "box": BOX}, "no sentence", "is empty"),
    ({"expressions": ["a\ud800"], "box": BOX}, "no sentence", "no Unicode"),
    ({"mask": "mask.png", "rle": {}}, "two masks", "give one of mask and rle"),
    ({"box": [1, 2, 3]}, "wrong type", r"\[x0, y0, x1, y1\], not \[1, 2, 3\]"),
    ({"box": [1, 2, float("nan"), 4]}, "wrong type", "NaN"),
    ({"box": [1, 2, float("inf"), 4]}, "wrong type", "Infinity"),
    ({"box": [1, 2, True, 4]}, "wrong type", "true"),
    ({"box": [5, 2, 5, 4]}, "empty box", "has no area"),
    ({"box": [0.2, 0.2, 0.5, 0.4]}, "fractions", "box lies in 0..1; give pixels, here of 40 x 30"),
    ({"box": [0, 0, 1, 1], "mask": "mask.png"}, "fractions", "box lies in 0..1"),
    ({"polygons": [[0.2, 0.2, 0.5, 0.2, 0.5, 0.4]]}, "fractions", "polygons lie in 0..1"),
    ({"box": [50, 2, 60, 4]}, "outside", "holds no pixel of 40 x 30"),
    ({"mask": "mask.png", "box": [0, 0, 3, 3]}, "box off mask", "does not touch the mask"),
    ({"mask": 3}, "wrong type", "mask must be the relative path"),
    ({"mask": "../mask.png"}, "bad name", "mask: '../mask.png' leads out of"),
    ({"mask": "none.png"}, "no mask file", r"none\.png: no such mask"),
    ({"mask": "manifest.jsonl"}, "broken mask", "not a readable mask"),
    ({"mask": "small.png"}, "mask size", r"has 4 x 3 pixels, its picture has 40 x 30"),
    ({"mask": "empty.png"}, "empty mask", '"mask": null says nothing is meant'),
    ({"mask": "mask.jpg"}, "broken mask", "save it as PNG"),
    ({"polygons": 3}, "wrong type", "polygons must be a list"),
    ({"polygons": [[1, 2, 3, 4]]}, "wrong type", "4 numbers are not 3 or more corners"),
    ({"polygons": [[1, 2, 3, 4, 5, "6"]]}, "wrong type", r"expected \[x, y"),
    ({"polygons": [[[1, 2], [3], [4, 5]]]}, "wrong type", "a corner must be"),
    ({"polygons": [[0, 0, 1e8, 0, 5, 5]]}, "outside", "far outside"),
    ({"polygons": [[50, 40, 60, 40, 60, 50]]}, "empty mask", "polygons is empty"),
    ({"rle": 3}, "broken mask", "expected"),
    ({"rle": {"size": [30, 41], "counts": [1230]}}, "mask size", "its picture has 40 x 30"),
    ({"rle": {"size": [30, 40], "counts": [1230]}}, "broken mask", "add up to 1230"),
    ({"rle": {"size": [30, 40], "counts": [1300, -100]}}, "broken mask", "whole numbers"),
    ({"rle": {"size": [30, 40], "counts": [1199.5, 0.5]}}, "broken mask", "whole numbers"),
    ({"rle": {"size": [30, 40], "counts": "é~"}}, "broken mask", "no compressed"),
    ({"rle": {"size": [30, 40], "counts": "o"}}, "broken mask", "cut off"),
    ({"rle": {"size": [30, 40], "counts": [1200]}}, "empty mask", "rle is empty"),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD_ROWS)
def test_a_bad_row_says_what_is_wrong(write, row, kind, message):
    directory = write({"box": BOX}, row)
    Image.new("L", (4, 3)).save(directory / "small.png")
    Image.new("L", (WIDTH, HEIGHT)).save(directory / "empty.png")
    Image.new("L", (WIDTH, HEIGHT), 255).save(directory / "mask.jpg")
    source = Folder(directory)
    assert len(source) == 2 and source[0].box.tolist() == BOX
    with pytest.raises(RowError, match=message) as caught:
        source[1]
    assert "manifest.jsonl, line 2: " in str(caught.value)
    assert caught.value.kind == kind


@pytest.mark.parametrize(("line", "message"), NOT_ROWS)
def test_a_line_that_is_no_row_counts_in_every_split(write, line, message):
    directory = write({"box": BOX}, line, {"box": BOX, "split": "val"})
    for split, bad in (("train", 1), ("val", 0)):
        source = Folder(directory, split)
        assert len(source) == 2 == len(source.num_expressions)
        with pytest.raises(RowError, match=f"line 2: .*{message}"):
            source[bad]
        source[1 - bad]


def test_lines_that_are_no_utf8(write):
    directory = write({"box": BOX})
    file = directory / "manifest.jsonl"
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content + content.replace(b"it", b"\xff\xfe"))
    source = Folder(directory)
    source[0]
    with pytest.raises(RowError, match="line 3: not JSON"):
        source[1]


def test_separators_of_windows(write):
    directory = write({"image": "photos\\b.png", "mask": "masks\\b.png"})
    for name, file in (("photos", "a.png"), ("masks", "mask.png")):
        (directory / name).mkdir()
        (directory / file).rename(directory / name / "b.png")
    np.testing.assert_array_equal(Folder(directory)[0].mask, MASK)


def test_runs_agree_with_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = tuple(int(n) for n in rng.integers(1, 90, 2))
        mask = rng.random(size) < rng.choice([0.02, 0.5, 0.98])
        for compressed in (True, False):
            np.testing.assert_array_equal(decode_runs(rle(mask, compressed), size), mask)
        counts = [float(n) for n in rle(mask, False)["counts"]]  # as NumPy's floats become JSON
        runs = {"size": list(size), "counts": counts}
        np.testing.assert_array_equal(decode_runs(runs, size), mask)


def test_polygons_of_two_corners_cover_nothing():
    """pycocotools takes them, and all after them, for boxes."""
    square = np.array(POLYGON, float).reshape(-1, 2)
    drawn = draw_polygons([square[:2], square], (HEIGHT, WIDTH))
    np.testing.assert_array_equal(drawn > 0, MASK)
    assert not draw_polygons([square[:2]], (HEIGHT, WIDTH)).any()


def test_pictures_of_every_kind(tmp_path):
    """Each as a viewer shows it; the left half is darker, and the right edge is transparent."""
    grey = np.full((20, 30), 200, np.uint8)
    grey[:, :15] = 60
    rgb = np.dstack([grey] * 3)
    alpha = np.full_like(grey, 255)
    alpha[:, 25:] = 0
    seen = rgb.copy()
    seen[:, 25:] = 255
    palette = Image.fromarray(grey, "L").convert("P")
    turned = Image.fromarray(np.rot90(rgb))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    cases = {
        "grey.png": (Image.fromarray(grey), {}, rgb),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}, rgb),
        "cmyk.jpg": (Image.fromarray(rgb).convert("CMYK"), {"quality": 100}, rgb),
        "palette.png": (palette, {}, rgb),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), {}, seen),
        "two.gif": (palette, {"save_all": True, "append_images": [turned.convert("P")]}, rgb),
        "turned.jpg": (turned, {"exif": exif, "quality": 100}, rgb),
        "one.png": (Image.fromarray(grey > 100), {}, np.dstack([(grey > 100) * np.uint8(255)] * 3)),
    }
    for name, (picture, options, expected) in cases.items():
        picture.save(tmp_path / name, **options)
        found = read_image(tmp_path / name)
        assert found.dtype == np.uint8 and found.shape == (20, 30, 3), name
        assert np.abs(found.astype(int) - expected).max() <= 6, name
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(to_rgb(opened), found)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(SampleError, match=r"float\.tif: not a readable picture .*32 bits"):
        read_image(tmp_path / "float.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgba.png").read_bytes()[:60])
    with pytest.raises(SampleError, match=r"cut\.png: not a readable picture"):
        read_image(tmp_path / "cut.png")


def test_a_mask_lies_on_the_upright_picture(write):
    directory = write({"image": "turned.jpg", "mask": "mask.png"}, {"image": "a.png", "box": BOX})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(directory / "turned.jpg", exif=exif)
    np.testing.assert_array_equal(Folder(directory)[0].mask, MASK)
    Image.new("RGB", (WIDTH, HEIGHT)).save(directory / "turned.jpg", exif=exif)
    with pytest.raises(RowError, match="upright as EXIF orientation 6"):
        Folder(directory)[0]


def test_bad_rows_are_counted_in_training_and_stop_an_evaluation(write, processor, caplog):
    rows = [{"box": BOX, "expressions": [f"good {i}"]} for i in range(6)]
    directory = write(*rows, {"image": "missing.png", "box": BOX}, "{")
    buckets = Buckets(
        prompt_tokens=(96,), windows=(9,), canvas=((HEIGHT, WIDTH),), answer_tokens=(40,)
    )
    source = Folder(directory)
    pipeline = Pipeline(source, processor, 4, 0, buckets=buckets)
    drawn = list(itertools.islice(pipeline, 4))
    assert pipeline.bad_samples == 4 and len(drawn) == 4  # two epochs of eight, two bad in each
    assert "missing.png" in caplog.text and "line 8: not JSON" in caplog.text
    with pytest.raises(RowError, match=r"missing\.png"):
        list(Evaluation(source, processor, 4, buckets=buckets))
