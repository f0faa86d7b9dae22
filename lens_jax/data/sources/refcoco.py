"""RefCOCO, RefCOCO+, RefCOCOg and refCLEF as REFER and LISA lay them out.

    DATA_DIR/refer_seg/refcoco/{refs(unc).p, instances.json}
    DATA_DIR/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg
    DATA_DIR/refer_seg/images/saiapr_tc-12/00/images/25.jpg    refCLEF's

A sample is a referred object with all its sentences.
"""

import dataclasses
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import UInt8

from lens_jax.data.masks import decode_runs, draw_polygons
from lens_jax.data.sample import Sample, SampleError, read_image

# Who split the sentences: the file's name says it.
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}
# Where pictures lie: REFER's place, then shorter ones people use, then COCO's own beside refer_seg.
IMAGE_FOLDERS = (
    "refer_seg/images/mscoco/images/train2014",
    "refer_seg/images/train2014",
    "coco/train2014",
    "train2014",
)
REFCLEF_FOLDERS = ("refer_seg/images/saiapr_tc-12", "saiapr_tc-12")


@dataclasses.dataclass(frozen=True)
class Ref:
    """A referred object before anything is read: its sentences and its annotation."""

    ref_id: int
    image_id: int
    file_name: str
    size: tuple[int, int]  # (height, width)
    expressions: tuple[str, ...]
    bbox: tuple[float, ...]  # x, y, width, height
    segmentation: Any


class RefCoco:
    """One split of one data set.

    Args:
        data_dir: the folder that holds `refer_seg/`.
        dataset: refcoco, refcoco+, refcocog or refclef.
        split: train, val, testA and testB, or test for refcocog; refclef has a testC, too.
        official_masks: where an object's polygons overlap, count the overlap as background, as
            the official evaluation does.

    Raises:
        FileNotFoundError, ValueError: a file or the split is not there, or cannot be read.
    """

    def __init__(
        self,
        data_dir: str | Path,
        dataset: str = "refcoco",
        split: str = "train",
        *,
        official_masks: bool = False,
    ):
        self.split, self.official_masks = split, official_masks
        refs_file, refs = _read_refs(data_dir, dataset)
        names = sorted({ref["split"] for ref in refs})
        if split not in names:
            raise ValueError(f"split: {split!r} is none of {', '.join(names)} of {refs_file}")
        self.refs = _join(refs, split, refs_file.with_name("instances.json"))
        places = REFCLEF_FOLDERS if dataset == "refclef" else IMAGE_FOLDERS
        folders = [Path(data_dir) / name for name in places]
        self.image_folder = next((f for f in folders if f.is_dir()), folders[0])
        self.num_expressions = [len(ref.expressions) for ref in self.refs]

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> Sample:
        ref = self.refs[index]
        path = self.image_folder / ref.file_name
        image = read_image(path)
        if image.shape[:2] != ref.size:
            raise SampleError(
                f"{path}: {image.shape[1]} x {image.shape[0]} pixels, but its annotation says "
                f"{ref.size[1]} x {ref.size[0]}"
            )
        try:
            x, y, width, height = (float(v) for v in ref.bbox)
            mask = summed_mask(ref.segmentation, *ref.size)
        except (ValueError, TypeError, OverflowError) as error:
            raise SampleError(
                f"{path}: ref {ref.ref_id} has a broken mask or box ({error})"
            ) from error
        return Sample(
            image=image,
            expressions=ref.expressions,
            mask=mask == 1 if self.official_masks else mask > 0,
            box=np.array([x, y, x + width, y + height]),
            ref_id=ref.ref_id,
            image_id=ref.image_id,
            image_path=str(path),
        )


def splits(data_dir: str | Path, dataset: str) -> list[str]:
    """What splits a data set has; raises as `RefCoco` does."""
    return sorted({ref["split"] for ref in _read_refs(data_dir, dataset)[1]})


def _read_refs(data_dir: str | Path, dataset: str) -> tuple[Path, list[dict[str, Any]]]:
    """A data set's refs file, and what is in it."""
    if dataset not in SPLIT_BY:
        raise ValueError(f"dataset: {dataset!r} is none of {', '.join(SPLIT_BY)}")
    folder = Path(data_dir) / "refer_seg" / dataset
    refs_file = folder / f"refs({SPLIT_BY[dataset]}).p"
    for file in (refs_file, folder / "instances.json"):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing: data_dir must hold refer_seg/ in REFER's layout"
            )
    refs = load_refs(refs_file)
    if not all(isinstance(ref.get("split"), str) for ref in refs):
        raise ValueError(f"{refs_file}: not a refs file (a ref has no split)")
    return refs_file, refs


def summed_mask(segmentation: Any, height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """How many of an annotation's parts cover each pixel.

    `segmentation` is in COCO's form: polygons [x, y, x, y, …], or a run-length encoding with counts
    as numbers or compressed, or several of those. Nothing is an empty mask.

    Raises:
        ValueError, TypeError, OverflowError: it is nothing of these.
    """
    if not segmentation:
        return np.zeros((height, width), np.uint8)
    parts = [segmentation] if isinstance(segmentation, Mapping) else list(segmentation)
    size = (height, width)
    if isinstance(parts[0], Mapping):
        return np.sum([decode_runs(part, size) for part in parts], axis=0, dtype=np.uint8)
    corners = [np.asarray(part, np.float64).reshape(-1, 2) for part in parts]
    return draw_polygons(corners, size)


def load_refs(file: Path) -> list[dict[str, Any]]:
    """Reads a refs pickle. Only plain data is let in: no class, no function."""
    try:
        refs = _PlainUnpickler(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{file}: not a refs file ({error})") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{file}: not a refs file (a list of dicts is expected)")
    return refs


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and plain data needs no code")


def _join(refs: list[dict[str, Any]], split: str, instances_file: Path) -> list[Ref]:
    """The split's refs with what instances.json says about their objects and pictures."""
    try:
        instances = json.loads(instances_file.read_text())
        images = {image["id"]: image for image in instances["images"]}
        annotations = {a["id"]: a for a in instances["annotations"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{instances_file}: not COCO annotations ({error})") from error
    joined = []
    for ref in refs:
        if ref["split"] != split:
            continue
        try:
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            joined.append(
                Ref(
                    ref_id=ref["ref_id"],
                    image_id=ref["image_id"],
                    file_name=image["file_name"],
                    size=(image["height"], image["width"]),
                    expressions=tuple(sentence["sent"] for sentence in ref["sentences"]),
                    bbox=tuple(annotation["bbox"]),
                    segmentation=annotation["segmentation"],
                )
            )
        except KeyError as key:
            raise ValueError(
                f"{instances_file}: ref {ref.get('ref_id')} refers to {key}, which is not there"
            ) from None
        except TypeError as error:
            raise ValueError(
                f"{instances_file}: ref {ref.get('ref_id')} is broken ({error})"
            ) from None
    return joined
