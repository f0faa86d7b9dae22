"""RefCOCO, RefCOCO+, RefCOCOg and refCLEF as REFER and LISA lay them out.

    DATA_DIR/refer_seg/refcoco/{refs(unc).p, instances.json}
    DATA_DIR/refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000009.jpg
    DATA_DIR/refer_seg/images/saiapr_tc-12/00/images/25.jpg    refCLEF's

A sample is a referred object with all its sentences.

Annotations, sentences included ("the left man"), speak for the pixels as they are stored: the
official code reads them so, and the browsers in which people wrote them did not turn images
upright. Samples therefore hold stored pixels, whatever EXIF says: image, mask, box and words
agree, and scores compare with the official ones.
"""

import dataclasses
import io
import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float, UInt8

from lens_jax.data.masks import decode_runs, draw_polygons
from lens_jax.data.percent import HIGHEST, Coordinates, Reach
from lens_jax.data.sample import Sample, SampleError, read_image
from lens_jax.data.sources.annotations import (
    check_size,
    fitting_box,
    inside,
    is_blank,
    numbers,
    picture_size,
    sentences,
    short,
    whole_number,
)

log = logging.getLogger("lens_jax")

# Who split the sentences: the file's name says it.
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}
# Where images lie: REFER's place, then shorter ones people use, then COCO's own beside refer_seg.
IMAGE_FOLDERS = (
    "refer_seg/images/mscoco/images/train2014",
    "refer_seg/images/train2014",
    "coco/train2014",
    "train2014",
)
INSTANCES = "instances.json"
SEVERAL = "several objects, or none, a sentence, as in gRefCOCO: those are not read"
REFCLEF_FOLDERS = ("refer_seg/images/saiapr_tc-12", "saiapr_tc-12")


@dataclasses.dataclass(frozen=True)
class Ref:
    """A referred object before its image is read: its sentences and its annotation.

    `error` says why a ref cannot be used; the rest is then empty. `everywhere`: its split cannot be
    read, so that it counts in every one. `blank` sentences, which say nothing, were dropped, and so
    were `slivers`, polygons of under three corners.
    """

    ref_id: int | None
    image_id: int = 0
    file_name: str = ""
    size: tuple[int, int] = (0, 0)  # (height, width)
    expressions: tuple[str, ...] = ()
    bbox: tuple[float, ...] | None = None  # x, y, width, height; None: nothing is meant
    segmentation: Any = None
    error: str | None = None
    everywhere: bool = False
    blank: int = 0
    slivers: int = 0


class RefCoco:
    """One split of one data set.

    A broken ref counts as a sample with one sentence, of every split if its own cannot be read, and
    raises when it is asked for. What is dropped from refs is counted in the log.

    Args:
        data_dir: the folder that holds `refer_seg/`.
        dataset: refcoco, refcoco+, refcocog or refclef.
        split: train, val, testA and testB, or test for refcocog; refclef has a testC, too.
        official_masks: where an object's polygons overlap, count the overlap as background, as
            the official evaluation does.
        coordinates: "pixels" takes them for such even if they look like percent.

    Raises:
        FileNotFoundError, ValueError: a file or the split is not there, cannot be read, or is in
            percent.
    """

    def __init__(
        self,
        data_dir: str | Path,
        dataset: str = "refcoco",
        split: str = "train",
        *,
        official_masks: bool = False,
        coordinates: Coordinates = "auto",
    ):
        self.split, self.official_masks = split, official_masks
        refs_file, refs = _read_refs(data_dir, dataset)
        names = _splits(refs)
        if split not in names:
            raise ValueError(f"split: {split!r} is none of {', '.join(names)} of {refs_file}")
        self.refs = _join(refs, split, refs_file)
        reach = Reach() if coordinates == "pixels" else _reach(self.refs)
        if reach.is_percent:
            raise ValueError(
                f"{refs_file.with_name(INSTANCES)}: {reach} in split {split!r}: they are percent "
                "of the picture's sides; give pixels"
            )
        for name, what in (("blank", "empty sentences"), ("slivers", "parts of under 3 corners")):
            if dropped := sum(getattr(ref, name) for ref in self.refs):
                log.warning("%s: %d %s were dropped from %s", refs_file, dropped, what, split)
        places = REFCLEF_FOLDERS if dataset == "refclef" else IMAGE_FOLDERS
        folders = [Path(data_dir) / name for name in places]
        self.image_folder = next((f for f in folders if f.is_dir()), folders[0])
        self.num_expressions = [max(1, len(ref.expressions)) for ref in self.refs]
        self._instances_file = refs_file.with_name(INSTANCES)

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> Sample:
        ref = self.refs[index]
        if ref.error is not None:
            raise SampleError(ref.error)
        path = self.image_folder / ref.file_name
        image = read_image(path, pixels="stored")
        try:
            check_size(ref.size, image.shape[:2], "as stored")
        except ValueError as error:
            raise SampleError(f"{path}: {error}") from None
        mask, box = self.target(ref)
        return Sample(
            image=image,
            expressions=ref.expressions,
            mask=mask == 1 if self.official_masks else mask > 0,
            box=box,
            ref_id=ref.ref_id,
            image_id=ref.image_id,
            image_path=str(path),
        )

    def target(self, ref: Ref) -> tuple[UInt8[np.ndarray, "H W"], Float[np.ndarray, "4"] | None]:
        """How many parts of a ref's mask cover each stored pixel, and its box xyxy.

        Raises:
            SampleError: the ref is broken.
        """
        if ref.error is not None:
            raise SampleError(ref.error)
        try:
            mask = summed_mask(ref.segmentation, *ref.size)
            box = ref.bbox
            if box is not None:
                x, y, width, height = box
                box = (x, y, x + width, y + height)
            return mask, fitting_box(box, mask > 0, "bbox")
        except (ValueError, TypeError, OverflowError) as error:
            raise SampleError(
                f"{self._instances_file}: ref {ref.ref_id} has a broken mask or box ({error})"
            ) from error


def splits(data_dir: str | Path, dataset: str) -> list[str]:
    """The names of a data set's splits; raises as `RefCoco` does."""
    return _splits(_read_refs(data_dir, dataset)[1])


def _splits(refs: list[dict[str, Any]]) -> list[str]:
    return sorted({ref["split"] for ref in refs if isinstance(ref.get("split"), str)})


def _read_refs(data_dir: str | Path, dataset: str) -> tuple[Path, list[dict[str, Any]]]:
    """A data set's refs file, and what is in it."""
    if dataset not in SPLIT_BY:
        raise ValueError(f"dataset: {dataset!r} is none of {', '.join(SPLIT_BY)}")
    folder = Path(data_dir) / "refer_seg" / dataset
    refs_file = folder / f"refs({SPLIT_BY[dataset]}).p"
    for file in (refs_file, folder / INSTANCES):
        if not file.is_file():
            others = ", ".join(sorted(path.name for path in folder.glob("refs(*).p")))
            there = f", and {others} is split otherwise" if others and file == refs_file else ""
            raise FileNotFoundError(
                f"{file} is missing: data_dir must hold refer_seg/ in REFER's layout{there}"
            )
    refs = load_refs(refs_file)
    if not _splits(refs):
        raise ValueError(f"{refs_file}: not a refs file (no ref has a split)")
    if all(isinstance(ref.get("ann_id"), list | tuple) for ref in refs):
        raise ValueError(f"{refs_file}: its refs are of {SEVERAL}")
    return refs_file, refs


def summed_mask(segmentation: Any, height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """How many of an annotation's parts cover each pixel.

    `segmentation` is in COCO's form: polygons [x, y, x, y, …], or a run-length encoding with counts
    as numbers or compressed, or several of those. Nothing is an empty mask.

    Raises:
        ValueError, TypeError, OverflowError: it is nothing of these.
    """
    if segmentation is None or segmentation in ([], {}):
        return np.zeros((height, width), np.uint8)
    if not isinstance(segmentation, Mapping | list | tuple):
        raise ValueError(f"segmentation must be polygons or run lengths, not {short(segmentation)}")
    parts = [segmentation] if isinstance(segmentation, Mapping) else list(segmentation)
    size = (height, width)
    if isinstance(parts[0], Mapping):
        count = sum(decode_runs(part, size).astype(np.int64) for part in parts)
        return np.minimum(count, 255).astype(np.uint8)
    # One or two corners enclose nothing; COCO's code takes four numbers for a box xywh.
    areas = [_corners(part) for part in parts if not is_sliver(part)]
    if not areas:
        raise ValueError("no polygon has three corners")
    together = np.concatenate(areas)
    if max(size) > 2 and together.min() > -0.01 and together.max() < 1.01:
        raise ValueError("its polygons are in fractions; give pixels")
    return draw_polygons(areas, size)


def is_sliver(part: Any) -> bool:
    """Whether a polygon [x, y, x, y, ...] has less than three corners, its last one cut or not."""
    return (
        isinstance(part, list | tuple)
        and len(part) < 6
        and all(type(value) in (int, float) for value in part)
    )


def _corners(part: Any) -> Float[np.ndarray, "N 2"]:
    count = len(part) if isinstance(part, list | tuple) else 0
    if not count or count % 2:
        raise ValueError(f"a polygon must be [x, y, x, y, ...], not {short(part)}")
    return np.array(numbers(part, count, "a polygon")).reshape(-1, 2)


def load_refs(file: Path) -> list[dict[str, Any]]:
    """Reads a refs pickle. Only plain data is let in: no class, no function.

    Text of Python 2, which has no encoding, is UTF-8; bytes that are not become surrogates.
    """
    try:
        content = io.BytesIO(file.read_bytes())
        refs = _PlainUnpickler(content, encoding="utf-8", errors="surrogateescape").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{file}: not a refs file ({error})") from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{file}: not a refs file (a list of dicts is expected)")
    return refs


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and plain data needs no code")


def _join(refs: list[dict[str, Any]], split: str, refs_file: Path) -> list[Ref]:
    """The split's refs with what instances.json says about their objects and images."""
    instances_file = refs_file.with_name(INSTANCES)
    try:
        instances = json.loads(instances_file.read_bytes())
        images, annotations = (_by_id(instances[key]) for key in ("images", "annotations"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{instances_file}: not COCO annotations ({error!r})") from error
    joined = []
    for number, ref in enumerate(refs):
        if ref.get("split") != split and isinstance(ref.get("split"), str):
            continue
        where = f"{refs_file}: ref {short(ref.get('ref_id', f'number {number}'))}"
        try:
            joined.append(_ref(ref, images, annotations))
        except ValueError as error:
            everywhere = not isinstance(ref.get("split"), str)
            joined.append(Ref(None, error=f"{where}: {error}", everywhere=everywhere))
    return joined


def _reach(refs: list[Ref]) -> Reach:
    """How far the coordinates of a split reach."""
    reach = Reach()
    for ref in refs:
        if ref.error is not None:
            continue
        parts = ref.segmentation if isinstance(ref.segmentation, list | tuple) else []
        try:
            corners = [
                _corners(p) for p in parts if not isinstance(p, Mapping | str) and len(p) > 5
            ]
            if ref.bbox is not None:
                x, y, width, height = ref.bbox
                corners.append(np.array([[x, y], [x + width, y + height]]))
            reach.add(ref.image_id, ref.size, np.concatenate(corners or [np.empty((0, 2))]))
        except (ValueError, TypeError):
            continue  # said when the ref is asked for
        if reach.largest.max() > HIGHEST:
            break
    return reach


def _by_id(entries: list[Any]) -> dict[Any, Any]:
    """Entries of instances.json by id; None where different ones share it."""
    table: dict[Any, Any] = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(key := entry.get("id"), int | float | str):
            table[key] = None if table.get(key, entry) != entry else entry
    return table


def _entry(table: dict[Any, Any], ref: dict[str, Any], key: str) -> dict[str, Any]:
    """The entry of instances.json that a ref names by one of its ids."""
    value = ref.get(key)
    if isinstance(value, list | tuple):
        raise ValueError(f"{key} is {short(value)}: {SEVERAL}")
    if not isinstance(value, int | float | str) or value not in table:
        raise ValueError(f"{key} is {short(value)}, which {INSTANCES} does not hold")
    if table[value] is None:
        raise ValueError(f"{key} is {short(value)}, under which {INSTANCES} holds two entries")
    return table[value]


def _ref(ref: dict[str, Any], images: dict, annotations: dict) -> Ref:
    if not isinstance(ref.get("split"), str):
        raise ValueError(f"split must be a name, not {short(ref.get('split'))}")
    image = _entry(images, ref, "image_id")
    annotation = _entry(annotations, ref, "ann_id")
    if annotation.get("image_id", ref["image_id"]) != ref["image_id"]:
        raise ValueError(
            f"image_id is {short(ref['image_id'])}, but its annotation is of "
            f"{short(annotation['image_id'])}"
        )
    said = ref.get("sentences")
    if not isinstance(said, list | tuple) or not all(isinstance(s, Mapping) for s in said):
        raise ValueError(f"sentences must be a list of objects, not {short(said)}")
    sents = [sentence.get("sent") for sentence in said]
    kept = [sent for sent in sents if not (isinstance(sent, str) and is_blank(sent))]
    segmentation = annotation.get("segmentation")
    parts = segmentation if isinstance(segmentation, list | tuple) else ()
    bbox = annotation.get("bbox")
    if bbox is not None:
        bbox = numbers(bbox, 4, f"bbox of annotation {ref['ann_id']}")
    file_name = image.get("file_name")
    inside(Path(), file_name, "file_name")
    return Ref(
        ref_id=whole_number(ref.get("ref_id"), "ref_id"),
        image_id=whole_number(ref["image_id"], "image_id"),
        file_name=file_name,
        size=picture_size(image, "height", "width"),
        expressions=sentences(kept or sents),
        bbox=bbox,
        segmentation=segmentation,
        blank=len(sents) - len(kept),
        slivers=sum(map(is_sliver, parts)),
    )
