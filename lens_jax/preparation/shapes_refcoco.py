"""Generated scenes on disk, as a genuine RefCOCO data set."""

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lens_jax import files
from lens_jax.preparation.shapes import (
    SHAPES,
    Scene,
    ShapeObject,
    coverage,
    is_held_out,
    random_scene,
    varied_scene,
)

SPLITS = ("train", "val", "testA", "testB")
DESCRIPTION = "generated shapes"


def drawn_in(directory: str | Path) -> dict[str, Any] | None:
    """Generated scenes of a directory, `{"description", "scenes", "seed"}`; {} if they are
    not complete, None without any.

    Raises:
        ValueError: it holds a RefCOCO that was not generated.
    """
    folder = Path(directory) / "refer_seg" / "refcoco"
    instances, complete = folder / "instances.json", (folder / "refs(unc).p").is_file()
    if not instances.is_file():
        return None
    try:
        content = json.loads(instances.read_text())
        info = content["info"] if content["info"]["description"] == DESCRIPTION else None
    except (ValueError, KeyError, TypeError):
        info = None if complete else {}  # else it was being written
    if info is None:
        raise ValueError(
            f"{folder} holds a RefCOCO that was not generated, and no scenes are drawn over it: "
            "set data.shapes.train_scenes to 0 to use it, or name another data.data_dir"
        )
    return info if complete else {}


def write_refcoco(out_dir: str | Path, num_scenes: Mapping[str, int], seed: int) -> None:
    """Writes scenes as a genuine RefCOCO data set: OUT_DIR/refer_seg/{images, refcoco}.

    Every split has images of its own. In training, one in three has another shape or a plain
    background, so that the model is not lost on images of one's own. Training says none of the
    held-out combinations of words (`is_held_out`); testA says only what training may say, testB
    only held-out combinations, val both. Objects that nothing is said about stay in
    instances.json, as in COCO. One object in eight, and every one that another hides in part, is
    encoded in runs, the others as polygons.

    Does nothing if OUT_DIR holds this very data set already; the refs file, written last, tells.
    Other generated scenes there are replaced.

    Args:
        num_scenes: scenes of each split: train, val, testA, testB.
        seed: of everything; a scene depends on (seed, split, its number in the split) alone.

    Raises:
        ValueError: an unknown split, or OUT_DIR holds a RefCOCO that was not generated.
    """
    unknown = set(num_scenes) - set(SPLITS)
    if unknown:
        raise ValueError(f"num_scenes: unknown split {sorted(unknown)[0]!r}, not in {SPLITS}")
    root = Path(out_dir) / "refer_seg"
    images = root / "images" / "mscoco" / "images" / "train2014"
    info = {"description": DESCRIPTION, "scenes": dict(num_scenes), "seed": seed}
    instances_file, refs_file = root / "refcoco/instances.json", root / "refcoco/refs(unc).p"
    if drawn_in(out_dir) == info:
        return
    refs_file.unlink(missing_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    instances_file.parent.mkdir(parents=True, exist_ok=True)

    instances = {
        "info": info,
        "licenses": [],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)],
        "images": [],
        "annotations": [],
    }
    refs, num_sentences = [], 0
    plan = [(split, i) for split in SPLITS for i in range(num_scenes.get(split, 0))]
    for image_id, (split, i) in enumerate(tqdm(plan, desc="drawing scenes", unit="scene"), start=1):
        rng = np.random.default_rng((seed, SPLITS.index(split), i))
        draw = varied_scene if split == "train" and i % 3 == 2 else random_scene
        scene = _scene_of_split(split, rng, draw)
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(images / file_name, quality=95, subsampling=0)
        height, width = scene.image.shape[:2]
        instances["images"].append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height}
        )
        for o in scene.objects:
            annotation_id = len(instances["annotations"]) + 1
            instances["annotations"].append(_annotation(o, annotation_id, image_id))
            sentences = [e.text for e in o.expressions]
            if not sentences:
                continue
            ids = list(range(num_sentences, num_sentences + len(sentences)))
            num_sentences += len(sentences)
            refs.append(
                {
                    "sent_ids": ids,
                    "file_name": f"COCO_train2014_{image_id:012d}_{annotation_id}.jpg",
                    "ann_id": annotation_id,
                    "ref_id": len(refs),
                    "image_id": image_id,
                    "split": split,
                    "sentences": [
                        {"tokens": text.split(), "raw": text, "sent_id": id, "sent": text}
                        for id, text in zip(ids, sentences, strict=True)
                    ],
                    "category_id": SHAPES.index(o.shape) + 1,
                }
            )
    instances_file.write_text(json.dumps(instances, separators=(",", ":")))
    with files.whole(refs_file) as unfinished:
        unfinished.write_bytes(pickle.dumps(refs, protocol=2))


def _scene_of_split(
    split: str, rng: np.random.Generator, draw: Callable[[np.random.Generator], Scene]
) -> Scene:
    """A scene with the expressions that its split may say; at least one."""
    allowed = {"train": (False,), "val": (False, True), "testA": (False,), "testB": (True,)}[split]
    while True:
        scene = draw(rng)
        objects = tuple(
            dataclasses.replace(
                o, expressions=tuple(e for e in o.expressions if is_held_out(e) in allowed)
            )
            for o in scene.objects
        )
        if any(o.expressions for o in objects):
            return Scene(scene.image, objects)


def _annotation(o: ShapeObject, annotation_id: int, image_id: int) -> dict[str, Any]:
    """An object as COCO writes it."""
    x0, y0, x1, y1 = o.box.tolist()
    outline = _outline(o)
    if annotation_id % 8 == 0 or outline is None:
        runs = np.flatnonzero(np.diff(o.mask.reshape(-1, order="F"), prepend=False, append=False))
        counts = np.diff(runs, prepend=0, append=o.mask.size).tolist()
        segmentation: Any = {"size": list(o.mask.shape), "counts": counts}
    else:
        segmentation = [outline]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": SHAPES.index(o.shape) + 1,
        "segmentation": segmentation,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(o.mask.sum()),
        "iscrowd": 0,
    }


def _outline(o: ShapeObject) -> list[float] | None:
    """The object's polygon [x, y, x, y, …], or None if it does not show its whole shape."""
    (x0, y0, x1, y1), side = o.box.tolist(), int(max(o.box[2:] - o.box[:2]))
    # Where edges are smoothed, the outermost pixels may be too faint to count as visible.
    whole = [(coverage(o.shape, side + faint) > 0.5).sum() for faint in range(3)]
    if o.mask.sum() not in whole:
        return None
    if o.shape == "square":
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif o.shape == "triangle":
        points = [((x0 + x1) / 2, y0), (x1, y1), (x0, y1)]
    else:
        angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        points = [(x + side / 2 * np.cos(a), y + side / 2 * np.sin(a)) for a in angles]
    return [round(float(v), 2) for point in points for v in point]
