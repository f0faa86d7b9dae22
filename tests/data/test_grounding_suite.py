"""GroundingSuite's captions, masks, and what is said of broken lines."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import open_source
from lens_jax.data.sources.grounding_suite import GroundingSuite, question

ROW = {"image_path": "a.jpg", "caption": "A box", "box": [1.5, 2, 3, 4]}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "GroundingSuite-Eval.jsonl").write_text("\n".join(lines))
        folder = tmp_path / "coco" / "unlabeled2017"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(folder / "a.jpg")
        return tmp_path

    return write


def run_lengths(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


@pytest.mark.parametrize(
    ("caption", "asked"),
    [
        ("The fish are here", "the fh  here"),
        ("This Is rare, Area", "th is r, area"),  # deleted as written, then lower-cased
        ("plain", "plain"),
    ],
)
def test_captions(caption, asked):
    assert question(caption, evaluation=True) == asked
    assert question(caption, evaluation=False) == f'"{caption}"'


def test_masks_of_several_parts(write):
    parts = np.zeros((2, 7, 9), bool)
    parts[0, 1:4, 2:5] = parts[1, 2:6, 4:8] = True
    row = ROW | {"segmentation": [run_lengths(part) for part in parts]}
    source = GroundingSuite(write(row, "", ROW | {"segmentation": run_lengths(parts[0])}))
    assert len(source) == 2 and source.num_expressions == [1, 1]
    np.testing.assert_array_equal(source[0].mask, parts.any(0))
    np.testing.assert_array_equal(source[1].mask, parts[0])
    assert source[0].box.tolist() == ROW["box"] and source[0].expressions == ('"A box"',)


def test_errors_say_what_is_wrong(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"GroundingSuite-Eval\.jsonl"):
        GroundingSuite(tmp_path)
    good = ROW | {"segmentation": run_lengths(np.ones((7, 9)))}
    for broken in ("{", "[]", ROW, good | {"box": [1, 2]}, good | {"caption": 3}):
        source = GroundingSuite(write(good, broken, good))
        assert source.num_expressions == [1, 1, 1] and source[2].mask.all()
        with pytest.raises(SampleError, match=r"jsonl: line 2 is broken"):
            source[1]
    (tmp_path / "GroundingSuite-Eval.jsonl").write_bytes(json.dumps(good).encode("utf-16"))
    with pytest.raises(ValueError, match=r"jsonl: its text is not UTF-8"):
        GroundingSuite(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"segmentation": run_lengths(np.ones((5, 5)))}, r"\[5, 5\] instead of \[7, 9\].*a\.jpg"),
        ({"segmentation": run_lengths(np.zeros((7, 9)))}, "the mask has no pixel"),
        ({"segmentation": 3}, "segmentation must be"),
        ({"box": [1, 2, float("inf"), 4]}, "finite"),
        ({"box": ["1", "2", "3", "4"]}, "finite"),
        ({"box": [3, 2, 1, 4]}, "no area"),
        ({"box": [0.1, 0.2, 0.5, 0.6]}, "fractions"),
        ({"box": [20, 20, 30, 30]}, "does not touch the mask"),
        ({"box": None}, "box is missing"),
        ({"caption": " "}, "caption is empty"),
        ({"caption": "are is"}, "is empty"),
        ({"image_path": "/etc/hostname"}, "leads out"),
        ({"image_path": "../unlabeled2017/a.jpg"}, "leads out"),
        ({"image_path": "C:\\a.jpg"}, "leads out"),
        ({"image_path": "..\\a.jpg"}, "leads out"),
        ({"image_path": None}, "image_path must be"),
    ],
)
def test_broken_values(write, values, said):
    row = ROW | {"segmentation": run_lengths(np.ones((7, 9)))}
    source = GroundingSuite(write(row, row | values), evaluation=True)
    assert source[0].mask.all()
    with pytest.raises(SampleError, match=rf"jsonl: line 2 .*{said}"):
        source[1]


def test_no_target(write):
    sample = GroundingSuite(write(ROW | {"box": None, "segmentation": []}))[0]
    assert sample.box is None and sample.mask.shape == (7, 9) and not sample.mask.any()


def test_official_masks_are_sums_of_parts(write):
    """As counted by the official evaluation: pixels of several parts are background."""
    parts = np.zeros((2, 7, 9), bool)
    parts[0, 1:4, 2:5] = parts[1, 2:6, 4:8] = True
    data_dir = write(ROW | {"segmentation": [run_lengths(part) for part in parts]})
    flags = {"evaluation": True, "official_masks": True}
    sample = open_source("grounding_suite", "all", data_dir, **flags)[0]
    np.testing.assert_array_equal(sample.mask, parts.sum(0) == 1)
    assert sample.mask.sum() < open_source("grounding_suite", "all", data_dir)[0].mask.sum()


def test_annotations_speak_for_stored_pixels(write):
    mask = np.zeros((9, 7), bool)
    mask[1:4, 2:5] = True
    data_dir = write(ROW | {"segmentation": run_lengths(mask), "box": [2, 1, 5, 4]})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (7, 9)).save(next(data_dir.rglob("a.jpg")), exif=exif)
    sample = GroundingSuite(data_dir)[0]
    assert sample.image.shape == (9, 7, 3)
    np.testing.assert_array_equal(sample.mask, mask)


def test_a_byte_order_mark_is_no_text(write):
    data_dir = write(ROW | {"segmentation": run_lengths(np.ones((7, 9)))})
    file = data_dir / "GroundingSuite-Eval.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert GroundingSuite(data_dir)[0].mask.all()


def test_a_line_ends_where_a_row_does(write):
    row = ROW | {"caption": "a\u2028b\u0085c", "segmentation": run_lengths(np.ones((7, 9)))}
    source = GroundingSuite(write(json.dumps(row, ensure_ascii=False), row))
    assert source[0].expressions == source[1].expressions == ('"a\u2028b\u0085c"',)


def test_a_file_without_rows_is_refused(write):
    with pytest.raises(ValueError, match="grounding_suite is empty"):
        open_source("grounding_suite", "all", write(""))
