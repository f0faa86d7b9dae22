"""ReasonSeg's files: labels and boxes, and what is said of broken ones."""

import json

import numpy as np
import pytest
from PIL import Image

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import open_source
from lens_jax.data.sources.reason_seg import ReasonSeg, label_map, mask_box, read_annotation
from lens_jax.preparation.conversion import convert

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


def test_no_target(write, processor):
    """An empty mask and no box, so that the answer that is taught has none either."""
    sample = ReasonSeg(write([("ignore", SQUARE)]))[0]
    assert not sample.mask.any() and sample.box is None
    text = processor.encoder.tokenizer.decode(processor.example(sample, "it").answer)
    assert "<|box_start|>" not in text
    assert mask_box(np.ones((3, 5), bool)).tolist() == [0, 0, 4, 2]


def test_encodings_and_sentences(write):
    data_dir = write([], text=("the café’s", "another"), encoding="cp1252")
    assert ReasonSeg(data_dir)[0].expressions == ("the café’s", "another")
    write([], text=("Größe",), name="b")
    source = ReasonSeg(data_dir, evaluation=True)
    assert [sample.expressions for sample in source] == [("the café’s",), ("Größe",)]
    assert source[0].box is None and source.num_expressions == [1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "the word “‘café’” on the sign…",
        "something that says ‘olé’…”",
        "what’s “red” – and costs £5, 7 € or 9¢?",
        "at 20°C, the École — Señor Müller’s",
    ],
)
def test_cp1252(write, text):
    data_dir = write([("x", SQUARE)], text=[text], encoding="cp1252")
    assert ReasonSeg(data_dir)[0].expressions == (text,)


def test_explanations_are_no_split(write):
    data_dir = write([("x", SQUARE)])
    folder = data_dir / "reason_seg" / "ReasonSeg" / "explanatory"
    folder.mkdir()
    (folder / "train.json").write_text('[{"image": "a.jpg", "query": "what?", "outputs": "it"}]')
    with pytest.raises(ValueError, match="'explanatory' is none of train of"):
        ReasonSeg(data_dir, "explanatory")
    summary = convert("reason_seg", data_dir, data_dir / "out")
    assert summary.rows == {"train": 1} and not summary.left_out


def test_one_sentence_where_a_list_is_expected(write):
    assert ReasonSeg(write([("x", SQUARE)], text="what is it?")).num_expressions == [1]
    assert ReasonSeg(write([("x", SQUARE)], text="what is it?"))[0].expressions == ("what is it?",)
    bom = ReasonSeg(write([("x", SQUARE)], text=["the café"], encoding="utf-8-sig"))
    assert bom[0].expressions == ("the café",)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("what is red?", "utf-16"),
        ("what is red?", "utf-16-le"),
        ("what is red?", "utf-32"),
        ("赤いものは何", "shift-jis"),
        ("あかいもの", "shift-jis"),  # every byte of it is defined in cp1252
        ("红色的是什么", "gbk"),
        ("что здесь красное", "cp1251"),
        ("red я b", "cp1251"),
        ("это", "koi8-r"),
        ("a 红 b", "gbk"),
        ("赤 red", "shift-jis"),
        ("żółty dům", "cp1250"),
        ("café", "cp437"),
        ("the town of Perú", "cp437"),
        ("the word “cafe” on it", "mac_roman"),
        ("it’s red", "mac_roman"),
        ("a café", "mac_roman"),
        ("a naïve Noël", "mac_roman"),
        ("red … or blue", "mac_roman"),
        ("red — blue", "mac_roman"),
        ("what\x92s red", "utf-8"),
    ],
)
def test_an_unknown_encoding_is_refused(write, text, encoding):
    source = ReasonSeg(write([("x", SQUARE)], text=[text], encoding=encoding))
    assert source.num_expressions == [1]
    with pytest.raises(SampleError, match=r"a\.json: .*save it as UTF-8\)$"):
        source[0]


def test_utf8_with_a_damaged_byte_is_refused(write):
    data_dir = write([("x", SQUARE)], text=["the café’s door"])
    file = next(data_dir.rglob("a.json"))
    file.write_bytes(file.read_bytes().replace(b"door", b"d\xe9or"))
    with pytest.raises(SampleError, match="neither UTF-8 nor cp1252"):
        ReasonSeg(data_dir)[0]


@pytest.mark.parametrize("text", [[""], ["good", "  "], "", [], None, [3], 3, ["\u200b"], {"a": 1}])
def test_sentences_that_say_nothing_are_refused(write, text):
    write([("x", SQUARE)], name="b")
    source = ReasonSeg(write([("x", SQUARE)], text=text))
    with pytest.raises(SampleError, match=r"a\.json: .*`text`"):
        source[0]
    assert source[1].expressions == ("it",)


def write_more(data_dir, **values):
    file = next(data_dir.rglob("a.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return data_dir


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"points": [[1, 2, 3]]}, "2 numbers"),
        ({"points": [[1, float("nan")], [2, 3], [4, 5]]}, "finite"),
        ({"points": [["1", "2"], [2, 3], [4, 5]]}, "finite"),
        ({"points": []}, "list of corners"),
        ({"points": None}, "list of corners"),
        ({"points": [[0, 0], [9, 9], [9000, 3]]}, "far outside"),
        ({"points": [[0.2, 0.3], [0.6, 0.3], [0.6, 0.8]]}, "fractions"),
        ({"points": [[4, 5], [6, 5]], "shape_type": "circle"}, "'circle'; draw a polygon"),
        ({"points": SQUARE, "label": None}, "`label`"),
        (3, "must be an object"),
    ],
)
def test_broken_polygons(write, shape, said):
    shape = {"label": "target", **shape} if isinstance(shape, dict) else shape
    data_dir = write_more(write([]), shapes=[shape])
    with pytest.raises(SampleError, match=rf"a\.(json|jpg): .*{said}") as caught:
        ReasonSeg(data_dir)[0]
    assert "\n" not in str(caught.value)


def test_a_rectangle_has_two_corners(write):
    shape = {"label": "target", "shape_type": "rectangle", "points": [[10, 9], [2, 3]]}
    mask = ReasonSeg(write_more(write([]), shapes=[shape]))[0].mask
    assert mask[3:10, 2:11].all() and mask.sum() == 7 * 9


def test_annotations_speak_for_upright_pixels(write):
    data_dir = write([("target", SQUARE)])
    exif = Image.Exif()
    exif[0x0112] = 6
    file = next(data_dir.rglob("a.jpg"))
    Image.new("RGB", (14, 20)).save(file, exif=exif)
    for size in ({}, {"imageWidth": 20, "imageHeight": 14}):
        sample = ReasonSeg(write_more(data_dir, **size))[0]
        assert sample.image.shape == (14, 20, 3) and sample.mask[3:10, 2:11].all()
    with pytest.raises(SampleError, match=r"a\.jpg: 20 x 14 pixels .*EXIF.* says 14 x 20"):
        ReasonSeg(write_more(data_dir, imageWidth=14, imageHeight=20))[0]
    with pytest.raises(SampleError, match=r"a\.json: .*imageHeight"):
        ReasonSeg(write_more(data_dir, imageHeight="14"))[0]


def test_pictures_of_other_kinds_and_files_of_macos(write):
    data_dir = write([("target", SQUARE)])
    file = next(data_dir.rglob("a.jpg"))
    file.unlink()
    Image.new("RGB", (20, 14), "red").save(file.with_suffix(".png"))
    file.with_name("._a.json").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    source = ReasonSeg(data_dir)
    assert len(source) == 1 and source[0].image_path.endswith("a.png")


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
    write([("x", SQUARE)])
    file.with_suffix(".jpg").unlink()
    with pytest.raises(SampleError, match=r"a\.jpg: no such picture"):
        ReasonSeg(data_dir)[0]


def test_a_split_without_samples_is_refused(write, tmp_path):
    (write([("x", SQUARE)]) / "reason_seg" / "ReasonSeg" / "val").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: split 'val' of reason_seg is empty"):
        open_source("reason_seg", "val", tmp_path)
