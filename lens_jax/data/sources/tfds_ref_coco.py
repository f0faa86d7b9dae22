"""TensorFlow Datasets' ref_coco, read without TensorFlow.

    DATA_DIR/ref_coco/<config>/<version>/    as `tfds build ref_coco --file_format=array_record`
                                             prepares it; configs are refcoco_unc, refcoco_google,
                                             refcocoplus_unc, refcocog_google and refcocog_umd

A record there is an image with all of its objects; a sample here is one object. Boxes and masks
speak for the pixels as they are stored, as in RefCOCO's own files; samples hold those, whatever
EXIF says.
"""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lens_jax.data.sample import Sample, SampleError, to_rgb
from lens_jax.data.sources.annotations import check_size, fitting_box, numbers, sentences

NAME = "ref_coco"
CONFIG = "refcoco_unc"


class TfdsRefCoco:
    """One split of one config, in the files' order.

    Opening it reads every record once, for nothing but the records says how many objects and
    sentences they hold.

    Args:
        data_dir: TensorFlow Datasets' data_dir, which holds ref_coco/.
        split: train, val (or validation), test, testA or testB, of `CONFIG`; CONFIG/SPLIT for
            another one.

    Raises:
        FileNotFoundError, ValueError: the data set is not there, has another file format or no
            such split, or tensorflow_datasets is not installed.
    """

    def __init__(self, data_dir: str | Path, split: str = "train"):
        config, _, split = split.rpartition("/")
        self.name = f"{NAME}/{config or CONFIG}"
        self.split = "validation" if split == "val" else split
        info_file = _check(Path(data_dir), self.name, self.split)
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(info_file.parent)
        self._features = builder.info.features
        self._decoders = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(
            split=self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        # Without images; the library insists on every ragged feature.
        refexp = tfds.features.Sequence({"raw": tfds.features.Text(), "refexp_id": np.int64})
        index = tfds.features.FeaturesDict({"objects": tfds.features.Sequence({"refexp": refexp})})
        self._places: list[tuple[int, int]] = []
        self.num_expressions: list[int] = []
        for record in tqdm(range(len(self._records)), desc="reading the index", unit="picture"):
            try:
                objects = index.deserialize_example_np(self._records[record])["objects"]
                counts = [len(sentences) for sentences in objects["refexp"]["raw"]]
            except Exception:  # a damaged record: one sample, which says so when it is read
                counts = [1]
            self._places += [(record, place) for place in range(len(counts))]
            self.num_expressions += [max(1, count) for count in counts]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        record, place = self._places[index]
        where = f"tfds:{self.name}/{self.split}, record {record}"
        try:
            content = self._features.deserialize_example_np(
                self._records[record], decoders=self._decoders
            )
            with Image.open(io.BytesIO(content["image"])) as picture:
                image = to_rgb(picture, pixels="stored")
            objects = content["objects"]
            mask = objects["mask"][place][..., 0] > 0
            check_size(mask.shape, image.shape[:2], "as stored")
            height, width = mask.shape
            y0, x0, y1, x1 = numbers(objects["bbox"][place].tolist(), 4, "bbox")
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            said = [text.decode().strip() for text in objects["refexp"]["raw"][place]]
            return Sample(
                image=image,
                expressions=sentences(said),
                mask=mask,
                box=fitting_box(box, mask, "bbox"),
                ref_id=int(objects["id"][place]),
                image_id=int(content["image/id"]),
                image_path=where,
            )
        except Exception as error:  # decoders raise nearly anything on damaged bytes
            raise SampleError(f"{where}: object {place} is not readable ({error})") from error


def _check(data_dir: Path, name: str, split: str) -> Path:
    """The newest version's dataset_info.json, if this module can read its data set."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise ValueError("tfds_ref_coco needs tensorflow_datasets: pip install 'lens-jax[tfds]'")
    files = sorted((data_dir / name).glob("*/dataset_info.json"))
    if not files:
        raise FileNotFoundError(
            f"{data_dir / name} is missing or not prepared: data_dir must hold it as "
            "`tfds build ref_coco --file_format=array_record` writes it"
        )
    try:
        info = json.loads(files[-1].read_text())
        splits, file_format = [s["name"] for s in info["splits"]], info["fileFormat"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{files[-1]}: not TensorFlow Datasets' ({error!r})") from error
    if file_format != "array_record":
        raise ValueError(
            f"{files[-1]}: the file format is {file_format}, which takes TensorFlow to read; "
            "prepare it with `tfds build ref_coco --file_format=array_record`"
        )
    if split not in splits:
        raise ValueError(f"split: {split!r} is none of {', '.join(splits)} of {files[-1].parent}")
    return files[-1]
