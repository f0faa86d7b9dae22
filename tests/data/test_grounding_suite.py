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
        with pytest.raises(ValueError, match=r"jsonl: line 2 is broken"):
            GroundingSuite(write(good, broken))
    other = GroundingSuite(write(good | {"segmentation": run_lengths(np.ones((5, 5)))}))
    with pytest.raises(SampleError, match=r"a\.jpg.* broken mask"):
        other[0]


def test_a_line_ends_where_a_row_does(write):
    row = ROW | {"caption": "a\u2028b\u0085c", "segmentation": run_lengths(np.ones((7, 9)))}
    source = GroundingSuite(write(json.dumps(row, ensure_ascii=False), row))
    assert source[0].expressions == source[1].expressions == ('"a\u2028b\u0085c"',)


def test_a_file_without_rows_is_refused(write):
    with pytest.raises(ValueError, match="grounding_suite is empty"):
        open_source("grounding_suite", "all", write(""))
