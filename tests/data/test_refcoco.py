"""The RefCOCO source on generated data: what is written is read, and nothing unsafe is."""

import json
import pickle
import shutil

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import Joined, shapes
from lens_jax.data.sources.refcoco import RefCoco, load_refs, summed_mask


def test_written_scenes_are_read_back(shapes_dir):
    source = RefCoco(shapes_dir, "refcoco", "val")
    truth = []
    for i in range(10):
        scene = shapes._scene_of_split("val", np.random.default_rng((3, 1, i)))
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
    shapes.write_refcoco(tmp_path, {"train": 5}, seed=3)
    name = "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000003.jpg"
    assert (tmp_path / name).read_bytes() == (shapes_dir / name).read_bytes()
    before = (tmp_path / name).stat().st_mtime_ns
    shapes.write_refcoco(tmp_path, {"train": 5}, seed=3)
    assert (tmp_path / name).stat().st_mtime_ns == before
    shapes.write_refcoco(tmp_path, {"train": 5}, seed=4)
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
        [[]],
        [None],
        3,
    ],
)
def test_a_broken_mask_is_an_error_and_no_crash(broken):
    with pytest.raises((ValueError, TypeError)):
        summed_mask(broken, 24, 32)
