"""ReasonSeg as LISA lays it out: an image and a labelme file of the same name.

    DATA_DIR/reason_seg/ReasonSeg/{train, val, test}/<name>.{jpg, json}

A sample is an image with the polygons of its target and the sentences that ask for it. They speak
for upright pixels, as EXIF says: labelme shows images so, and the official code paints masks on
what cv2.imread returns, which is upright, too.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from lens_jax.data import boxes
from lens_jax.data.sample import Sample, SampleError, read_image
from lens_jax.data.sources.annotations import check_size, numbers, picture_size, sentences, short

IGNORED = 255  # pixels that are neither target nor background, in `label_map`
LONGEST_SIDE = 640
FLAG = "flag"  # the label, in any case, of what is not of the image
SIZE = ("imageHeight", "imageWidth")  # labelme's keys
NO_SPLIT = ("explanatory",)  # folders of the published data set that hold no labelme files
ENDINGS = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")
# What English text holds beyond ASCII: marks, and letters with accents among others. Bytes of any
# other code page, or of UTF-8 with a damaged byte, give something else when read as cp1252.
_MARKS, _MONEY, _CAPITALS = "‘’“”´–—…•\xa0", "€£¥¢", "À-ÖØ-Þ"
_ACCENTED, _LETTER = f"{_CAPITALS}ß-öø-ÿ", r"[^\W\d_]"
NOT_CP1252 = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f]"
    f"|[^\0-\x7f{_MARKS}{_MONEY}°{_ACCENTED}]"
    f"|(?<![A-Za-z])[{_ACCENTED}](?![A-Za-z])"
    f"|(?<=[a-z])[{_CAPITALS}]"
    f"|(?<={_LETTER})[‘“”•](?={_LETTER})"
    f"|(?<={_LETTER})[{_MONEY}]|[{_MONEY}](?={_LETTER})"
    r"|(?<![\d ])°"
)
# Of a sentence that somebody read in a wrong encoding before it was saved.
CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


@dataclasses.dataclass(frozen=True)
class Annotation:
    """A labelme file. `polygons` holds what each one is labelled and its corners (x, y).

    `size` is the image's (height, width), where the file says it. `error` says why a file cannot
    be used; the rest is then empty.
    """

    image: Path
    sentences: tuple[str, ...] = ()
    polygons: tuple[tuple[str, Int[np.ndarray, "N 2"]], ...] = ()
    size: tuple[int, int] | None = None
    error: str | None = None


class ReasonSeg:
    """One split, by file name.

    A file that cannot be read counts as a sample with one sentence, and raises when it is asked
    for. A sample without target has an empty mask and no box.

    Args:
        data_dir: the folder that holds `reason_seg/`.
        split: train, val or test.
        evaluation: ask each image's first sentence alone and give no box, as the official
            evaluation does.

    Raises:
        FileNotFoundError, ValueError: the split is not there.
    """

    def __init__(self, data_dir: str | Path, split: str = "train", *, evaluation: bool = False):
        root = Path(data_dir) / "reason_seg" / "ReasonSeg"
        splits = [folder.name for folder in split_folders(root)]
        if not splits:
            raise FileNotFoundError(
                f"{root} is missing: data_dir must hold reason_seg/ReasonSeg/ with the splits in it"
            )
        if split not in splits:
            raise ValueError(f"split: {split!r} is none of {', '.join(splits)} of {root}")
        self.evaluation = evaluation
        self.annotations = [_read(file) for file in annotation_files(root / split)]
        self.num_expressions = [
            1 if evaluation else max(1, len(annotation.sentences))
            for annotation in self.annotations
        ]

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Sample:
        annotation = self.annotations[index]
        if annotation.error is not None:
            raise SampleError(annotation.error)
        image = read_image(annotation.image)
        # What is to be ignored counts as background.
        mask = label_map(annotation, image.shape[0], image.shape[1]) == 1
        return Sample(
            image=image,
            expressions=annotation.sentences[: self.num_expressions[index]],
            mask=mask,
            box=None if self.evaluation or not mask.any() else mask_box(mask),
            ref_id=index,
            image_id=index,
            image_path=str(annotation.image),
            longest_side=LONGEST_SIDE,
            antialias=False,
        )


def split_folders(root: Path) -> list[Path]:
    """The folders of the splits, by name."""
    return sorted(folder for folder in root.glob("*/") if folder.name not in NO_SPLIT)


def annotation_files(folder: Path) -> list[Path]:
    """A split's files in order, without those that macOS leaves beside them on foreign disks."""
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith("._"))


def _read(file: Path) -> Annotation:
    try:
        return read_annotation(file)
    except ValueError as error:
        return Annotation(_picture(file), error=str(error))


def read_annotation(file: Path) -> Annotation:
    """Reads a labelme file: UTF-8, or cp1252 where it is not.

    Raises:
        ValueError: it is no annotation; the text names the file.
    """
    try:
        content = json.loads(_decoded(file.read_bytes()))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if not isinstance(content.get("shapes"), list):
            raise ValueError(f"`shapes` must be a list, not {short(content.get('shapes'))}")
        said = sentences(content.get("text"), "`text`")
        if wrong := CONTROL.search(" ".join(said)):
            raise ValueError(f"`text` holds the control character {wrong[0]!r}; save it as UTF-8")
        has_size = any(content.get(key) not in (None, 0) for key in SIZE)
        return Annotation(
            image=_picture(file),
            sentences=said,
            polygons=tuple(_polygon(shape) for shape in content["shapes"]),
            size=picture_size(content, *SIZE) if has_size else None,
        )
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{file}: not a labelme annotation ({error})") from error


def _decoded(content: bytes) -> str:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        # UTF-16 and UTF-32 may decode as UTF-8, with NUL for every other letter.
        if not ("\0" in text if encoding != "cp1252" else NOT_CP1252.search(text)):
            return text
    raise ValueError("its text is neither UTF-8 nor cp1252; save it as UTF-8")


def _picture(file: Path) -> Path:
    """The image of the same name; the data set's own are .jpg."""
    names = [file.with_suffix(ending) for ending in ENDINGS]
    return next((name for name in names if name.is_file()), names[0])


def _polygon(shape: Any) -> tuple[str, Int[np.ndarray, "N 2"]]:
    if not isinstance(shape, dict):
        raise ValueError(f"a shape must be an object, not {short(shape)}")
    label, points = shape.get("label"), shape.get("points")
    kind = shape.get("shape_type") or "polygon"
    if not isinstance(label, str):
        raise ValueError(f"`label` of a shape must be a string, not {short(label)}")
    if label.lower() == FLAG:
        return label, np.zeros((0, 2), np.int32)
    if not isinstance(points, list) or not points:
        raise ValueError(f"`points` of {short(label)} must be a list of corners")
    corners = [numbers(point, 2, f"a corner of {short(label)}") for point in points]
    if kind == "rectangle" and len(corners) == 2:
        (x0, y0), (x1, y1) = corners
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif kind not in ("polygon", "rectangle"):
        raise ValueError(f"{short(label)} is a {short(kind)}; draw a polygon")
    # Corners between pixels are cut off to whole ones.
    return label, np.array(corners).astype(np.int32)


def label_map(annotation: Annotation, height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """1 where the target is, `IGNORED` where nothing is to be judged, 0 elsewhere.

    Polygons are painted by area, the largest first, so that small ones lie on top. A polygon
    covers its outline, too. One labelled flag is no polygon of the image.

    Args:
        height, width: of the upright image.

    Raises:
        SampleError: the annotation is for an image of another size, or not in pixels.
    """
    try:
        check_size(annotation.size, (height, width), "upright as its EXIF says")
    except ValueError as error:
        raise SampleError(f"{annotation.image}: {error}") from None
    polygons = [(label, c) for label, c in annotation.polygons if label.lower() != FLAG]
    if (
        polygons
        and max(height, width) > 2
        and all((c >= 0).all() and (c <= 1).all() for _, c in polygons)
    ):
        raise SampleError(f"{annotation.image}: its polygons are in fractions; give pixels")
    shapes, areas = [], []
    for label, corners in polygons:
        if (np.abs(corners) > 2 * max(height, width)).any():
            raise SampleError(
                f"{annotation.image}: {label!r} has a corner far outside of {width} x {height}"
            )
        value = IGNORED if "ignore" in label.lower() else 1
        painted = np.zeros((height, width), np.uint8)
        _paint(painted, corners, 1)
        shapes.append((corners, value))
        areas.append(painted.sum(dtype=np.int64))
    labels = np.zeros((height, width), np.uint8)
    for i in np.argsort(areas)[::-1]:
        _paint(labels, *shapes[i])
    return labels


def mask_box(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "4"]:
    """xyxy of the first and the last pixels that are set, of which there must be one."""
    return (boxes.mask_box(mask) - (0, 0, 1, 1)).astype(np.int64)


def _paint(canvas: UInt8[np.ndarray, "H W"], corners: Int[np.ndarray, "N 2"], value: int) -> None:
    cv2.polylines(canvas, [corners], isClosed=True, color=value, thickness=1)
    cv2.fillPoly(canvas, [corners], value)
