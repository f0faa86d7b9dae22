"""ReasonSeg as LISA lays it out. What is to be ignored becomes background."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lens_jax.data.masks import encode_runs
from lens_jax.data.sample import SampleError, read_image
from lens_jax.data.sources import reason_seg
from lens_jax.preparation.conversion.objects import Found, LeftOut, Picture


def read(data_dir: Path) -> Iterator[Found | LeftOut]:
    """DATA_DIR/reason_seg/ReasonSeg, all splits."""
    root = data_dir / "reason_seg" / "ReasonSeg"
    files = [
        file
        for folder in reason_seg.split_folders(root)
        for file in reason_seg.annotation_files(folder)
    ]
    if not files:
        raise FileNotFoundError(f"{root} is missing, or has no split with .json files in it")
    return (_object(file, (data_dir, root)) for file in files)


def _object(file: Path, roots: tuple[Path, ...]) -> Found | LeftOut:
    try:
        annotation = reason_seg.read_annotation(file)
        size = annotation.size or read_image(annotation.image).shape[:2]
        mask = reason_seg.label_map(annotation, *size) == 1
    except ValueError as error:
        return LeftOut("its annotation is broken", str(error))
    except SampleError as error:
        return LeftOut("its picture or a polygon cannot be read", str(error))
    corners = np.concatenate([np.empty((0, 2)), *(c for _, c in annotation.polygons)])
    target = {"rle": encode_runs(mask)} if mask.any() else {"mask": None}
    row = {"expressions": list(annotation.sentences), **target, "split": file.parent.name}
    return Found(
        Picture(annotation.image, roots, None, size, "upright"),
        row,
        str(file),
        file.parent.name,
        corners=corners,
    )
