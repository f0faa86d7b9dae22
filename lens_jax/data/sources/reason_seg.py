"""ReasonSeg as LISA lays it out: a picture and a labelme file of the same name.

    DATA_DIR/reason_seg/ReasonSeg/{train, val, test}/<name>.{jpg, json}

A sample is a picture with the polygons of its target and the sentences that ask for it.
"""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from lens_jax.data.sample import Sample, SampleError, read_image

IGNORED = 255  # pixels that are neither target nor background, in `label_map`
LONGEST_SIDE = 640


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A labelme file. `polygons` holds what each one is labelled and its corners (x, y)."""

    image: Path
    sentences: tuple[str, ...]
    polygons: tuple[tuple[str, Int[np.ndarray, "N 2"]], ...]


class ReasonSeg:
    """One split, by file name.

    Args:
        data_dir: the folder that holds `reason_seg/`.
        split: train, val or test.
        evaluation: ask each picture's first sentence alone and give no box, as the official
            evaluation does.

    Raises:
        FileNotFoundError, ValueError: the split is not there, or a file cannot be read.
    """

    def __init__(self, data_dir: str | Path, split: str = "train", *, evaluation: bool = False):
        root = Path(data_dir) / "reason_seg" / "ReasonSeg"
        splits = sorted(path.name for path in root.glob("*/"))
        if not splits:
            raise FileNotFoundError(
                f"{root} is missing: data_dir must hold reason_seg/ReasonSeg/ with the splits in it"
            )
        if split not in splits:
            raise ValueError(f"split: {split!r} is none of {', '.join(splits)} of {root}")
        self.evaluation = evaluation
        self.annotations = [read_annotation(f) for f in sorted((root / split).glob("*.json"))]
        self.num_expressions = [
            1 if evaluation else len(annotation.sentences) for annotation in self.annotations
        ]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        annotation = self.annotations[index]
        image = read_image(annotation.image)
        # What is to be ignored counts as background.
        mask = label_map(annotation, image.shape[0], image.shape[1]) == 1
        return Sample(
            image=image,
            expressions=annotation.sentences[: self.num_expressions[index]],
            mask=mask,
            box=None if self.evaluation else mask_box(mask),
            ref_id=index,
            image_id=index,
            image_path=str(annotation.image),
            longest_side=LONGEST_SIDE,
            antialias=False,
        )


def read_annotation(file: Path) -> Annotation:
    """Reads a labelme file: UTF-8, or cp1252 where it is not."""
    content = file.read_bytes()
    try:
        try:
            content = json.loads(content.decode())
        except UnicodeDecodeError:
            content = json.loads(content.decode("cp1252"))
        annotation = Annotation(
            image=file.with_suffix(".jpg"),
            sentences=tuple(content["text"]),
            polygons=tuple(
                # Corners between pixels are cut off to whole ones.
                (shape["label"], np.array(shape["points"], np.float64).astype(np.int32))
                for shape in content["shapes"]
            ),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a labelme annotation ({error})") from error
    if not annotation.sentences or not all(isinstance(s, str) for s in annotation.sentences):
        raise ValueError(f"{file}: `text` must be a list of at least one sentence")
    if not all(isinstance(label, str) for label, _ in annotation.polygons):
        raise ValueError(f"{file}: `label` of a shape must be a string")
    return annotation


def label_map(annotation: Annotation, height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """1 where the target is, `IGNORED` where nothing is to be judged, 0 elsewhere.

    Polygons are painted by area, the largest first, so that small ones lie on top. A polygon
    covers its outline, too. One labelled flag is no polygon of the picture.
    """
    shapes, areas = [], []
    for label, corners in annotation.polygons:
        if label.lower() == "flag":
            continue
        value = IGNORED if "ignore" in label.lower() else 1
        painted = np.zeros((height, width), np.uint8)
        try:
            _paint(painted, corners, 1)
        except cv2.error as error:
            raise SampleError(f"{annotation.image}: broken polygon {label!r} ({error})") from error
        shapes.append((corners, value))
        areas.append(painted.sum(dtype=np.int64))
    labels = np.zeros((height, width), np.uint8)
    for i in np.argsort(areas)[::-1]:
        _paint(labels, *shapes[i])
    return labels


def mask_box(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "4"]:
    """xyxy of the first and the last pixels that are set; zeros where none is."""
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return np.zeros(4, np.int64)
    return np.array([xs.min(), ys.min(), xs.max(), ys.max()])


def _paint(canvas: UInt8[np.ndarray, "H W"], corners: Int[np.ndarray, "N 2"], value: int) -> None:
    cv2.polylines(canvas, [corners], isClosed=True, color=value, thickness=1)
    cv2.fillPoly(canvas, [corners], value)
