"""ReasonSeg's files: labels and boxes, and what is said of broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import open_source
from lens_jax.data.sources.reason_seg import ReasonSeg, label_map, mask_box, read_annotation

SQUARE = [[2.9, 3.9], [10.2, 3.0], [10.0, 9.9], [2.0, 9.0]]


@pytest.fixture
def write(tmp_path):
    """Writes one sample of the train split; returns data_dir."""

    def write(shapes, text=("it",), name="a", encoding="utf-8"):
        folder = tmp_path / "reason_seg" / "ReasonSeg" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        shapes = [{"label": label, "points": points} for label, points in shapes]
        content = json.dumps({"text": text, "shapes": shapes}, ensure_ascii=False)
        (folder / f"{name}.json").write_bytes(content.encode(encoding))
        Image.new("RGB", (20, 14)).save(folder / f"{name}.jpg")
        return tmp_path

    return write


def labels(data_dir):
    return label_map(ReasonSeg(data_dir).annotations[0], 14, 20)


def test_a_polygon_covers_its_outline(write):
    """Corners are cut off to whole pixels, the last row and column included."""
    expected = np.zeros((14, 20), np.uint8)
    expected[3:10, 2:11] = 1
    np.testing.assert_array_equal(labels(write([("target", SQUARE)])), expected)
    sample = ReasonSeg(write([("target", SQUARE)]))[0]
    np.testing.assert_array_equal(sample.mask, expected == 1)
    assert sample.box.tolist() == [2, 3, 10, 9]


def test_small_polygons_lie_on_large_ones(write):
    small = [[4, 5], [6, 5], [6, 7], [4, 7]]
    for shapes in ([("Ignored", small), ("x", SQUARE)], [("x", SQUARE), ("to IGNORE", small)]):
        found = labels(write(shapes))
        assert (found[5:8, 4:7] == 255).all() and (found == 255).sum() == 9
        assert (found == 1).sum() == 7 * 9 - 9
    covered = labels(write([("target", small), ("ignore", SQUARE)]))
    assert (covered == 1).sum() == 9


def test_flags_are_no_polygons(write):
    assert not labels(write([("Flag", SQUARE)])).any()
    assert labels(write([("flagpole", SQUARE)])).any()


def test_no_target(write):
    sample = ReasonSeg(write([("ignore", SQUARE)]))[0]
    assert not sample.mask.any() and sample.box.tolist() == [0, 0, 0, 0]
    assert mask_box(np.ones((3, 5), bool)).tolist() == [0, 0, 4, 2]


def test_encodings_and_sentences(write):
    data_dir = write([], text=("the café’s", "another"), encoding="cp1252")
    assert ReasonSeg(data_dir)[0].expressions == ("the café’s", "another")
    write([], text=("Größe",), name="b")
    source = ReasonSeg(data_dir, evaluation=True)
    assert [sample.expressions for sample in source] == [("the café’s",), ("Größe",)]
    assert source[0].box is None and source.num_expressions == [1, 1]


def test_errors_say_what_is_wrong(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="reason_seg/ReasonSeg"):
        ReasonSeg(tmp_path)
    data_dir = write([("x", SQUARE)])
    with pytest.raises(ValueError, match="split: 'val' is none of train"):
        ReasonSeg(data_dir, "val")
    file = tmp_path / "reason_seg" / "ReasonSeg" / "train" / "a.json"
    for broken in (b"{", b"[]", b'{"text": ["a"]}', b'{"text": [], "shapes": []}'):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_annotation(file)
    with pytest.raises(ValueError, match=r"a\.json: `label`"):
        ReasonSeg(write([(None, SQUARE)]))
    write([("x", SQUARE)])
    file.with_suffix(".jpg").unlink()
    with pytest.raises(SampleError, match=r"a\.jpg: no such picture"):
        ReasonSeg(data_dir)[0]
    write([("x", [[1.0, 2.0, 3.0]])])
    with pytest.raises(SampleError, match="broken polygon 'x'"):
        ReasonSeg(data_dir)[0]


def test_a_split_without_samples_is_refused(write, tmp_path):
    (write([("x", SQUARE)]) / "reason_seg" / "ReasonSeg" / "val").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: split 'val' of reason_seg is empty"):
        open_source("reason_seg", "val", tmp_path)
