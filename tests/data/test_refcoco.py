"""The RefCOCO source on generated data: what is written is read, and nothing unsafe is."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import Joined
from lens_jax.data.sources.refcoco import RefCoco, load_refs, summed_mask
from lens_jax.preparation import shapes, shapes_refcoco
from lens_jax.preparation.conversion import convert


def test_written_scenes_are_read_back(shapes_dir):
    source = RefCoco(shapes_dir, "refcoco", "val")
    truth = []
    for i in range(10):
        scene = shapes_refcoco._scene_of_split(
            "val", np.random.default_rng((3, 1, i)), shapes.random_scene
        )
        truth += [(scene, o) for o in scene.objects if o.expressions]
    assert len(source) == len(truth)
    assert list(source.num_expressions) == [len(o.expressions) for _, o in truth]
    for sample, (scene, o) in zip((source[i] for i in range(len(source))), truth, strict=True):
        assert sample.expressions == tuple(e.text for e in o.expressions)
        np.testing.assert_array_equal(sample.box, o.box)
        union = (sample.mask | o.mask).sum()
        assert (sample.mask & o.mask).sum() >= 0.93 * union
        assert np.abs(sample.image.astype(float) - scene.image).mean() < 3  # JPEG


def test_both_ways_of_writing_masks_occur(shapes_dir):
    instances = json.loads((shapes_dir / "refer_seg/refcoco/instances.json").read_text())
    kinds = [type(a["segmentation"]) for a in instances["annotations"]]
    assert 0.05 < kinds.count(dict) / len(kinds) < 0.4 and list in kinds


def test_held_out_words_are_held_out(shapes_dir):
    def sentences(split):
        source = RefCoco(shapes_dir, "refcoco", split)
        return {text for ref in source.refs for text in ref.expressions}

    held_out = set()
    rng = np.random.default_rng(0)
    for _ in range(3000):
        for o in shapes.random_scene(rng).objects:
            held_out |= {e.text for e in o.expressions if shapes.is_held_out(e)}
    assert not sentences("train") & held_out
    assert not sentences("testA") & held_out
    assert sentences("testB") <= held_out


def test_same_seed_same_files_and_nothing_twice(shapes_dir, tmp_path):
    shapes_refcoco.write_refcoco(tmp_path, {"train": 5}, seed=3)
    name = "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000003.jpg"
    assert (tmp_path / name).read_bytes() == (shapes_dir / name).read_bytes()
    before = (tmp_path / name).stat().st_mtime_ns
    shapes_refcoco.write_refcoco(tmp_path, {"train": 5}, seed=3)
    assert (tmp_path / name).stat().st_mtime_ns == before
    shapes_refcoco.write_refcoco(tmp_path, {"train": 5}, seed=4)
    assert (tmp_path / name).read_bytes() != (shapes_dir / name).read_bytes()


def test_masks_in_every_form_agree():
    runs = coco_mask.frPyObjects([[4.0, 2, 20, 2, 20, 9, 4, 9]], 24, 32)[0]
    mask = coco_mask.decode(runs)
    flat = np.asarray(mask).reshape(-1, order="F")
    counts = np.diff(np.flatnonzero(np.diff(flat, prepend=0, append=0)), prepend=0, append=768)
    text = {"size": [24, 32], "counts": runs["counts"].decode()}
    plain = {"size": [24, 32], "counts": counts.tolist()}
    for form in ([[4.0, 2, 20, 2, 20, 9, 4, 9]], runs, text, plain, [text], [plain]):
        np.testing.assert_array_equal(summed_mask(form, 24, 32), mask)
    assert summed_mask([], 24, 32).sum() == 0
    twice = summed_mask([[4.0, 2, 20, 2, 20, 9, 4, 9]] * 2, 24, 32)
    assert twice.max() == 2
    whole = {"size": [24, 32], "counts": [0, 768]}
    assert (summed_mask([whole] * 257, 24, 32) == 255).all()
    # One or two corners enclose nothing, and do not make boxes of the others.
    slivers = summed_mask([[5, 5, 6, 6], [4.0, 2, 20, 2, 20, 9, 4, 9], [1, 1]], 24, 32)
    np.testing.assert_array_equal(slivers, mask)
    often = summed_mask([[4.0, 2, 20, 2, 20, 9, 4, 9]] * 256, 24, 32)
    np.testing.assert_array_equal(often, 255 * mask)


class _Code:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content", [pickle.dumps([_Code()]), b"garbage", pickle.dumps({"a": 1})])
def test_unsafe_or_broken_refs_are_refused(tmp_path, content, capsys):
    file = tmp_path / "refs(unc).p"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p"):
        load_refs(file)
    assert "must not run" not in capsys.readouterr().out


def test_errors_say_what_is_missing(shapes_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.p"):
        RefCoco(tmp_path, "refcoco", "train")
    with pytest.raises(ValueError, match="refcoco2"):
        RefCoco(shapes_dir, "refcoco2", "train")
    with pytest.raises(ValueError, match="testA, testB, train, val"):
        RefCoco(shapes_dir, "refcoco", "test")
    shutil.copytree(shapes_dir / "refer_seg", tmp_path / "refer_seg")
    source = RefCoco(tmp_path, "refcoco", "train")
    picture = tmp_path / source[0].image_path
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(SampleError, match=picture.name):
        source[0]
    picture.unlink()
    with pytest.raises(SampleError, match="no such picture"):
        source[0]


def test_joined_sources_follow_each_other(shapes_dir):
    parts = [RefCoco(shapes_dir, "refcoco", split) for split in ("val", "testA")]
    joined = Joined(parts)
    assert len(joined) == len(parts[0]) + len(parts[1]) == len(joined.num_expressions)
    assert joined[len(parts[0])].ref_id == parts[1][0].ref_id
    assert joined[len(parts[0]) - 1].ref_id == parts[0][len(parts[0]) - 1].ref_id
    with pytest.raises(IndexError):
        joined[len(joined)]


@pytest.mark.parametrize(
    "broken",
    [
        [[0, 0, 1e12, 0, 5, 5]],
        [[float("nan")] * 6],
        {"size": [24, 32], "counts": "~~~~~~~~"},
        {"size": [24, 32], "counts": [10, -5]},
        {"size": [10**6, 10**6], "counts": [10**12]},
        [[1, 2, 3]],
        [[20, 30, 60, 80]],
        [["4", "2", "20", "2", "20", "9"]],
        [[4.0, 2, 20, 2, 20, 9], {"size": [24, 32], "counts": [768]}],
        "4 2 20 2",
        True,
        [[]],
        [None],
        3,
    ],
)
def test_a_broken_mask_is_an_error_and_no_crash(broken):
    with pytest.raises((ValueError, TypeError)):
        summed_mask(broken, 24, 32)


SQUARE = [4, 2, 20, 2, 20, 9, 4, 9]


@pytest.fixture
def write(tmp_path):
    """Writes a data set of one picture and two refs, of which the first is changed."""

    def write(ref=(), annotation=(), image=(), exif=None, size=(32, 24), refs=None):
        folder = tmp_path / "refer_seg" / "refcoco"
        pictures = tmp_path / "refer_seg/images/mscoco/images/train2014"
        for directory in (folder, pictures):
            directory.mkdir(parents=True, exist_ok=True)
        options = {} if exif is None else {"exif": exif}
        Image.new("RGB", size).save(pictures / "a.jpg", **options)
        good = {"image_id": 1, "split": "train", "sentences": [{"sent": "it", "raw": "It"}]}
        rows = [{"ref_id": i, "ann_id": i, **good} for i in (1, 2)]
        rows[0] |= dict(ref)
        (folder / "refs(unc).p").write_bytes(pickle.dumps(rows if refs is None else refs))
        shape = {"image_id": 1, "bbox": [4, 2, 16, 7], "segmentation": [SQUARE]}
        annotations = [{"id": i, **shape} for i in (1, 2)]
        annotations[0] |= dict(annotation)
        images = [{"id": i, "file_name": "a.jpg", "width": 32, "height": 24} for i in (1, 3)]
        images[1] |= dict(image)
        content = {"images": images, "annotations": annotations}
        (folder / "instances.json").write_text(json.dumps(content))
        return RefCoco(tmp_path)

    return write


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("ref", "annotation", "said"),
    [
        ({}, {"bbox": [4, 2, INF, 7]}, "finite numbers, not .4, 2, inf, 7"),
        ({}, {"bbox": [NAN, 2, 16, 7]}, "finite"),
        ({}, {"bbox": ["4", "2", "16", "7"]}, "finite"),
        ({}, {"bbox": [4, 2, True, 7]}, "finite"),
        ({}, {"bbox": [4, 2, 16]}, "4 numbers"),
        ({}, {"bbox": None}, "bbox is missing"),
        ({}, {"bbox": [20, 9, -16, -7]}, "no area"),
        ({}, {"bbox": [4, 2, 0, 0]}, "no area"),
        ({}, {"bbox": [0.1, 0.1, 0.5, 0.3]}, "fractions"),
        ({}, {"bbox": [24, 15, 5, 5]}, "does not touch the mask"),
        ({}, {"segmentation": []}, "no pixel"),
        ({}, {"segmentation": None}, "no pixel"),
        ({}, {"segmentation": [[4, 2, 20, 9]]}, "three corners"),
        ({}, {"segmentation": {"size": [24, 32], "counts": "zzz"}}, "run-length"),
        (
            {},
            {"segmentation": {"size": [32, 24], "counts": [768]}},
            r"\[32, 24\] instead of \[24, 32",
        ),
        ({}, {"image_id": 3}, "its annotation is of 3"),
        ({"sentences": [{"sent": 7}]}, {}, "must be text, not 7"),
        ({"sentences": [{"sent": ""}]}, {}, "is empty"),
        ({"sentences": [{"sent": "good"}, {"sent": 7}]}, {}, "must be text, not 7"),
        ({"sentences": [{"sent": ""}, {"sent": " \t"}]}, {}, "is empty"),
        ({"sentences": [{"raw": "no sent"}]}, {}, "must be text, not None"),
        ({"sentences": []}, {}, "at least one sentence"),
        ({"sentences": "it"}, {}, "list of objects"),
        ({"sentences": [{"sent": b"it"}]}, {}, "must be text"),
        ({"ref_id": NAN}, {}, "ref_id must be a whole number"),
        ({"ann_id": 9}, {}, "ann_id is 9, which instances.json does not hold"),
        ({"ann_id": [1]}, {}, "ann_id is .1.: several objects, or none, a sentence"),
        ({}, {"segmentation": [[v / 32 for v in SQUARE]]}, "in fractions"),
        ({"image_id": "1"}, {}, "image_id is '1'"),
        ({"image_id": 3}, {"image_id": 3}, "a.jpg: 32 x 24 pixels .* says 16 x 24"),
        ({"split": None}, {}, "split must be a name"),
    ],
)
def test_one_broken_ref_costs_that_ref(write, ref, annotation, said):
    source = write(ref, annotation, image={"width": 16})
    assert source.num_expressions[0] >= 1
    with pytest.raises(SampleError, match=said) as caught:
        source[0]
    text = str(caught.value)
    assert "\n" not in text and ("ref " in text or "a.jpg" in text)
    assert source[1].box.tolist() == [4, 2, 20, 9] and source[1].mask.sum() == 16 * 7


@pytest.mark.parametrize("size", [0, -24, 24.5, NAN, INF, "24", None, True, 10**7])
def test_broken_sizes(write, size):
    source = write({"image_id": 3}, {"image_id": 3}, image={"height": size})
    with pytest.raises(SampleError, match=r"refs\(unc\)\.p: ref 1: height"):
        source[0]
    whole = write({"image_id": 3}, {"image_id": 3}, image={"height": 24.0, "width": 32.0})
    assert whole[0].mask.shape == (24, 32)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../train2014/a.jpg", "x/../../a.jpg", "", 3, "\0"]
)
def test_names_stay_inside_of_the_data_set(write, name):
    source = write({"image_id": 3}, {"image_id": 3}, image={"file_name": name})
    with pytest.raises(SampleError, match=r"refs\(unc\)\.p: ref 1: file_name"):
        source[0]


def test_no_target(write):
    sample = write(annotation={"segmentation": [], "bbox": [0, 0, 0, 0]})[0]
    assert sample.box is None and not sample.mask.any()


def test_annotations_speak_for_stored_pixels(write):
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = write(exif=exif)
        assert source[0].image.shape == (24, 32, 3) and source[0].mask[2:9, 4:20].all()
    with pytest.raises(SampleError, match=r"24 x 32 pixels \(as stored\).* says 32 x 24"):
        write(size=(24, 32), exif=exif)[0]


def test_entries_of_instances_that_share_an_id(write, tmp_path):
    write()
    file = tmp_path / "refer_seg/refcoco/instances.json"
    content = json.loads(file.read_text())
    content["annotations"] += [content["annotations"][1], content["annotations"][0] | {"bbox": []}]
    content["images"] += [None, {"no": "id"}, {"id": []}]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    source = RefCoco(tmp_path)
    with pytest.raises(SampleError, match=r"ann_id is 1, under which .* holds two entries"):
        source[0]
    assert source[1].mask.any()


def test_sentences_of_python_2(write):
    """Its pickles hold bytes where text is meant: UTF-8."""
    ref = b"(lp0\n(dp1\nS'ref_id'\nI1\nsS'ann_id'\nI1\nsS'image_id'\nI1\nsS'split'\nS'train'\nsS'"
    ref += b"sentences'\n(lp2\n(dp3\nS'raw'\nS'\\xe9'\nsS'sent'\nS'caf\\xc3\\xa9'\nsasa."
    source = write()
    file = source._instances_file.with_name("refs(unc).p")
    file.write_bytes(ref)
    data_dir = file.parents[2]
    assert RefCoco(data_dir)[0].expressions == ("café",)
    file.write_bytes(ref.replace(b"\\xc3", b""))
    with pytest.raises(SampleError, match="no Unicode text"):
        RefCoco(data_dir)[0]


def test_what_is_dropped_is_counted(write, caplog, tmp_path):
    """A sentence that says nothing, and parts of under three corners, cost no ref."""
    said = [{"sent": "red"}, {"sent": " "}, {"sent": "it"}]
    source = write({"sentences": said}, {"segmentation": [SQUARE, [], [1, 2, 3]]})
    assert source[0].expressions == ("red", "it") and source.num_expressions == [2, 1]
    assert source[0].mask.sum() == 16 * 7
    assert "1 empty sentences were dropped" in caplog.text
    assert "2 parts of under 3 corners were dropped" in caplog.text
    summary = convert("refcoco", tmp_path, tmp_path / "out")
    assert summary.rows == {"train": 2} and not summary.left_out
    assert [row[:2] for row in summary.remarks] == [
        ("sentences of it that say nothing were dropped", 1),
        ("parts of it with under three corners were dropped", 1),
    ]


def test_several_objects_a_sentence_are_not_read(write):
    refs = [{"ref_id": i, "ann_id": ids, "image_id": 1, "split": "train"} for i, ids in ((1, [1]),)]
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: .*as in gRefCOCO: those are not read"):
        write(refs=refs)


def percent(folder, count):
    """Refs in as many pictures of 640 x 480, annotated in percent."""
    (folder / "refer_seg/refcoco").mkdir(parents=True)
    pictures = folder / "refer_seg/images/mscoco/images/train2014"
    pictures.mkdir(parents=True)
    refs, images, annotations = [], [], []
    for i in range(count):
        Image.new("RGB", (640, 480)).save(pictures / f"{i}.png")
        said = [{"sent": "it"}]
        refs.append({"ref_id": i, "ann_id": i, "image_id": i, "split": "val", "sentences": said})
        images.append({"id": i, "file_name": f"{i}.png", "width": 640, "height": 480})
        shape = {"bbox": [20, 30, 45, 70.00000000000001]}
        shape["segmentation"] = [[20, 30, 65, 30, 65, 100.00000000000001]]
        annotations.append({"id": i, "image_id": i, **shape})
    (folder / "refer_seg/refcoco/refs(unc).p").write_bytes(pickle.dumps(refs))
    content = {"images": images, "annotations": annotations}
    (folder / "refer_seg/refcoco/instances.json").write_text(json.dumps(content))
    return folder


def test_percent_is_refused(tmp_path):
    few, many = percent(tmp_path / "few", 4), percent(tmp_path / "many", 5)
    assert len(RefCoco(few, "refcoco", "val")) == 4
    with pytest.raises(ValueError, match=r"instances\.json: no coordinate in 5 .* are percent"):
        RefCoco(many, "refcoco", "val")
    said = "its coordinates are percent of the picture's sides, not pixels"
    summary = convert("refcoco", many, tmp_path / "out")
    assert [row[:2] for row in summary.left_out] == [(said, 5)] and not summary.rows
    assert convert("refcoco", many, tmp_path / "out", coordinates="pixels").rows == {"val": 5}
    assert convert("refcoco", few, tmp_path / "few" / "out").rows == {"val": 4}


def test_another_split_is_named(write, tmp_path):
    write()
    folder = tmp_path / "refer_seg" / "refcoco"
    (folder / "refs(unc).p").rename(folder / "refs(google).p")
    with pytest.raises(FileNotFoundError, match=r"refs\(google\)\.p is split otherwise"):
        RefCoco(tmp_path)
