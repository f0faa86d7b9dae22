"""RefCOCO and its relatives as REFER lays them out; their annotations are for stored pixels."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from lens_jax.data.masks import encode_runs
from lens_jax.data.sample import SampleError
from lens_jax.data.sources import refcoco
from lens_jax.preparation.conversion.objects import (
    Found,
    LeftOut,
    Picture,
    Unfit,
    dropped,
    polygons,
)


def read(data_dir: Path, dataset: str) -> Iterator[Found | LeftOut]:
    """DATA_DIR/refer_seg in REFER's layout, all splits of one data set."""
    sources = [
        # Whether they are pixels is judged later, as of all layouts.
        refcoco.RefCoco(data_dir, dataset, split, coordinates="pixels")
        for split in refcoco.splits(data_dir, dataset)
    ]
    return _objects(sources, data_dir)


def _objects(sources: list[refcoco.RefCoco], data_dir: Path) -> Iterator[Found | LeftOut]:
    for number, source in enumerate(sources):
        for ref in source.refs:
            if ref.error is None:
                yield _object(source, ref, data_dir)
            elif number == 0 or not ref.everywhere:
                yield LeftOut("its ref is broken", ref.error)


def _object(source: refcoco.RefCoco, ref: refcoco.Ref, data_dir: Path) -> Found | LeftOut:
    where = f"ref {ref.ref_id} of {ref.file_name}"
    row = {"expressions": list(ref.expressions), "split": source.split}
    remarks = ("sentences of it that say nothing were dropped",) if ref.blank else ()
    try:
        mask, box = source.target(ref)
        if box is None:
            row["mask"] = None
        elif isinstance(ref.segmentation, Mapping):
            row |= {"rle": dict(ref.segmentation), "box": box.tolist()}
        elif isinstance(ref.segmentation[0], Mapping):
            row |= {"rle": encode_runs(mask > 0), "box": box.tolist()}
        else:
            parts, slivers = polygons(ref.segmentation)
            row |= {"polygons": parts, "box": box.tolist()}
            remarks += dropped(slivers)
    except SampleError as error:
        return LeftOut("its annotation is broken", str(error))
    except Unfit as error:
        return error.at(where)
    roots = (data_dir, source.image_folder)
    path = source.image_folder / ref.file_name
    return Found(Picture(path, roots, None, ref.size, "stored"), row, where, source.split, remarks)
