"""TensorFlow Datasets' ref_coco from a fabricated builder directory, without TensorFlow.

The library writes such directories with TensorFlow alone, because sentences are ragged; here the
same bytes are written with what it reads them with.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from lens_jax.data.sample import SampleError
from lens_jax.data.sources import open_source, tfds_ref_coco

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra tfds is not installed")

SIZE = (30, 40)


def scene(number):
    """A picture with two objects: (box in pixels, sentences) each."""
    rng = np.random.default_rng(number)
    image = np.kron(rng.integers(0, 255, (3, 4, 3), np.uint8), np.ones((10, 10, 1), np.uint8))
    return image, [((8, 5, 20, 12), ["The cup ", "left"]), ((0, 0, 40, 30), [f"all of {number}"])]


def mask_of(box):
    mask = np.zeros(SIZE, bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def encoded(picture, kind, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind, quality=100, subsampling=0, **options)
    return file.getvalue()


def record(number, image=None, **changes):
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    picture, objects = scene(number)
    boxes = [(y0 / 30, x0 / 40, y1 / 30, x1 / 40) for (x0, y0, x1, y1), _ in objects]
    sentences = [text for _, texts in objects for text in texts]
    values = {
        "image": [image or encoded(picture, "JPEG")],
        "image/id": [number],
        "objects/id": [10 * number, 10 * number + 1],
        "objects/area": [84, 1200],
        "objects/bbox": np.float32(boxes).ravel().tolist(),
        "objects/label": [1, 2],
        "objects/gt_box_index": [0, 1],
        "objects/mask": [encoded(mask_of(box), "PNG") for box, _ in objects],
        "objects/refexp/raw/ragged_flat_values": [text.encode() for text in sentences],
        "objects/refexp/raw/ragged_row_lengths_0": [len(texts) for _, texts in objects],
        "objects/refexp/refexp_id/ragged_flat_values": list(range(len(sentences))),
        "objects/refexp/refexp_id/ragged_row_lengths_0": [len(texts) for _, texts in objects],
        "coco_annotations/id": [1],
        "coco_annotations/area": [84],
        "coco_annotations/bbox": [0.0, 0.0, 0.5, 0.5],
        "coco_annotations/label": [1],
    } | {key.replace("__", "/"): value for key, value in changes.items()}
    lists = {
        int: ("int64_list", tf_feature_pb2.Int64List),
        float: ("float_list", tf_feature_pb2.FloatList),
        bytes: ("bytes_list", tf_feature_pb2.BytesList),
    }
    features = {}
    for key, value in values.items():
        name, kind = lists[type(value[0])]
        features[key] = tf_feature_pb2.Feature(**{name: kind(value=value)})
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    return example.SerializeToString()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """refcoco_unc: three pictures for training; for validation a damaged one, one with an EXIF
    orientation, one with broken objects, one without target, and a record that is none."""
    root = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder("ref_coco/refcoco_unc", data_dir=root, file_format="array_record")
    directory = Path(builder.data_path)
    directory.mkdir(parents=True)
    splits = []
    exif = Image.Exif()
    exif[0x0112] = 6
    for split, records in {
        "train": [record(i) for i in (1, 2, 3)],
        "validation": [
            record(4, image=b"\xff\xd8\xff"),
            record(5, image=encoded(scene(5)[0], "JPEG", exif=exif)),
            record(
                6,
                objects__refexp__raw__ragged_flat_values=[b"\xff", b"left", b" "],
                objects__bbox=[0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1],
            ),
            record(
                7,
                objects__bbox=[0.0] * 4 + [0.1, 0.1, float("nan"), 0.5],
                objects__mask=[encoded(np.zeros(SIZE, bool), "PNG")] * 2,
            ),
            b"\xff\xff",
        ],
    }.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            dataset_name="ref_coco",
            split=split,
            filetype_suffix="array_record",
        )
        file = directory / f"ref_coco-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for content in records:
            writer.write(content)
        writer.close()
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(records)],
                num_bytes=sum(map(len, records)),
                filename_template=template,
            )
        )
    builder.info.set_splits(tfds.core.splits.SplitDict(splits))
    builder.info.write_to_directory(directory)
    return root


def test_every_object_is_a_sample(data_dir):
    source = open_source("tfds_ref_coco", "train", data_dir)
    assert len(source) == 6 and source.num_expressions == [2, 1] * 3
    for index in range(6):
        number, place = index // 2 + 1, index % 2
        picture, objects = scene(number)
        sample = source[index]
        box, sentences = objects[place]
        assert np.abs(sample.image.astype(int) - picture).mean() < 3
        np.testing.assert_array_equal(sample.mask, mask_of(box))
        np.testing.assert_allclose(sample.box, box, atol=1e-4)
        assert sample.expressions == tuple(text.strip() for text in sentences)
        assert (sample.image_id, sample.ref_id) == (number, 10 * number + place)
    assert "tensorflow" not in sys.modules


def test_a_damaged_picture_is_named(data_dir):
    with pytest.raises(
        SampleError, match="tfds:ref_coco/refcoco_unc/validation, record 0: object 0 is not"
    ):
        open_source("tfds_ref_coco", "val", data_dir)[0]


def test_objects_are_read_for_what_they_must_be(data_dir):
    source = open_source("tfds_ref_coco", "val", data_dir)
    stored = source[2]
    assert stored.image.shape == (*SIZE, 3)
    np.testing.assert_array_equal(stored.mask, mask_of(scene(5)[1][0][0]))
    none = source[6]
    assert none.box is None and not none.mask.any()
    assert len(source) == 9 and source.num_expressions[8] == 1
    for index, said in {4: "utf-8", 5: "is empty", 7: "finite", 8: "record 4"}.items():
        with pytest.raises(SampleError, match=said):
            source[index]


def test_errors_say_what_is_wrong(data_dir, tmp_path):
    with pytest.raises(ValueError, match="split: 'testA' is none of train, validation"):
        open_source("tfds_ref_coco", "testA", data_dir)
    for split in ("refcocog_umd/test", "train"):
        with pytest.raises(FileNotFoundError, match="file_format=array_record"):
            open_source("tfds_ref_coco", split, tmp_path)
    folder = tmp_path / "ref_coco" / "refcoco_unc" / "1.1.0"
    folder.mkdir(parents=True)
    original = next(data_dir.rglob("dataset_info.json")).read_text()
    info = json.loads(original) | {"fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="the file format is tfrecord"):
        open_source("tfds_ref_coco", "train", tmp_path)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="not TensorFlow Datasets'"):
        open_source("tfds_ref_coco", "train", tmp_path)


def test_the_library_is_asked_for_only_when_needed(monkeypatch, tmp_path):
    code = "import sys, lens_jax.data.sources; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(tfds_ref_coco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lens-jax\[tfds\]'"):
        open_source("tfds_ref_coco", "train", tmp_path)
