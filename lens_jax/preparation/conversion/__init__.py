"""Data sets in other layouts, written as `manifest.jsonl` (`sources/folder.py` reads it)."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from lens_jax import files
from lens_jax.data.percent import Coordinates
from lens_jax.preparation.conversion import coco, labelme, objects, reason_seg, refer, writing
from lens_jax.preparation.conversion.writing import Summary

LAYOUTS = ("refcoco", "reason_seg", "coco", "labelme")


def convert(
    layout: str,
    data_dir: Path,
    output: Path,
    *,
    dataset: str = "refcoco",
    resized: Literal["refuse", "scale"] = "refuse",
    boxes: Literal["auto", "xywh", "xyxy"] = "auto",
    crowds: Literal["auto", "keep"] = "auto",
    coordinates: Coordinates = "auto",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Summary:
    """Writes OUTPUT/manifest.jsonl and OUTPUT/pictures/; nothing if it fails or finds no object.

    Images are hard links where the file system allows it, so that they take no space and stay
    when the originals are removed; copies elsewhere. Rows lie on the upright image, and each is
    one that the check accepts.

    Args:
        layout: one of LAYOUTS.
        dataset: which of RefCOCO's sets; the other layouts have one.
        resized: what happens to objects whose image has another size than they say.
        boxes: what COCO's `bbox` holds; auto: what most of a file's boxes tell.
        crowds: whether COCO's crowds are objects; auto: not those of COCO's own files.
        coordinates: auto leaves out files that are told to be in percent.

    Raises:
        FileExistsError: `output` exists and is not empty.
        FileNotFoundError, ValueError: `data_dir` has not this layout.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: remove it or name another output")
    objects.forget()
    if layout == "refcoco":
        found = refer.read(data_dir, dataset)
    elif layout == "reason_seg":
        found = reason_seg.read(data_dir)
    elif layout == "coco":
        found = coco.read(data_dir, boxes, keep_crowds=crowds == "keep")
    else:
        found = labelme.read(data_dir)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = files.hidden_directory(output.absolute())
    (unfinished / writing.PICTURES).mkdir()
    try:
        summary = writing.write(
            found,
            unfinished,
            data_dir,
            scale=resized == "scale",
            coordinates=coordinates,
            progress=progress,
        )
        if summary.rows:
            if output.exists():
                output.rmdir()
            unfinished.rename(output)
    finally:
        files.discard(unfinished)
    return summary
