"""Coloured shapes with expressions that name one of them: a data set anyone can generate.

A scene has two to six circles, squares and triangles on a background whose weak colour gradient
tells where on the picture one is, or on a plain one. Expressions come in three tiers, and the words
of a tier are needed to tell the objects apart:

1. colour and shape: "the red circle";
2. with the size: "the small blue square";
3. with a place or a relation: "the left red circle", "the green triangle above the blue square".
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from tqdm import tqdm

SIDE = 112
COLORS = {
    "red": (214, 44, 44),
    "green": (40, 168, 62),
    "blue": (48, 84, 222),
    "yellow": (236, 214, 48),
    "purple": (148, 52, 186),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (14, 25), "large": (29, 52)}  # pixels, both ends included
# Word of a place -> (axis, sign, sentence): the object at the end of that axis.
PLACES = {
    "left": (0, -1, ("the left {}", "the {} on the left")),
    "right": (0, 1, ("the right {}", "the {} on the right")),
    "top": (1, -1, ("the top {}", "the {} at the top")),
    "bottom": (1, 1, ("the bottom {}", "the {} at the bottom")),
}
RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
MARGIN = 12.0  # pixels by which a place or relation holds, or clearly does not


@dataclasses.dataclass(frozen=True)
class Expression:
    """A sentence that names one object of its scene; `words` are what it says about it."""

    text: str
    tier: int
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShapeObject:
    """One object; `box` (xyxy) and `mask` cover its visible pixels."""

    color: str
    shape: str
    size: str
    box: Float[np.ndarray, "4"]
    mask: Bool[np.ndarray, "H W"]
    expressions: tuple[Expression, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
    image: UInt8[np.ndarray, "H W 3"]
    objects: tuple[ShapeObject, ...]


def all_sentences() -> list[str]:
    """Every sentence an expression can hold, by tier."""
    nouns = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    forms = [form for _, _, forms in PLACES.values() for form in forms]
    return [
        *(f"the {noun}" for noun in nouns),
        *(f"the {size} {noun}" for size in SIZES for noun in nouns),
        *(form.format(noun) for form in forms for noun in nouns),
        *(f"the {a} {word} the {b}" for word in RELATIONS for a in nouns for b in nouns if a != b),
    ]


def is_held_out(expression: Expression) -> bool:
    """Whether this combination of words is kept out of training: about one in six of tiers 2, 3."""
    if expression.tier == 1:
        return False
    color, shape, word = expression.words[:3]
    vocabulary = [*SIZES, *PLACES, *RELATIONS]
    index = list(COLORS).index(color) + 2 * SHAPES.index(shape) + 5 * vocabulary.index(word)
    return index % 6 == 0


def random_scene(
    rng: np.random.Generator, size: tuple[int, int] = (SIDE, SIDE), plain: bool = False
) -> Scene:
    """Draws a scene; at least one of its objects has an expression.

    Args:
        size: (height, width) of the picture in pixels.
        plain: one colour behind the objects, light or dark, in place of the gradient; and the
            objects' colours vary more.
    """
    while True:
        kinds, boxes = _arrange(rng, size)
        expressions = _expressions(kinds, boxes, rng)
        if any(expressions):
            break
    image, masks = _draw(kinds, boxes, rng, size, plain)
    objects = []
    for (color, shape, size), mask, sentences in zip(kinds, masks, expressions, strict=True):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float64)
        objects.append(ShapeObject(color, shape, size, box, mask, tuple(sentences)))
    return Scene(image, tuple(objects))


def varied_scene(rng: np.random.Generator) -> Scene:
    """A scene as pictures of one's own may be: sides of 64 to 112 and 112, mostly plain."""
    narrow, plain, upright = rng.random(3) < (0.7, 0.6, 0.5)
    size = (int(rng.integers(64, SIDE)) if narrow else SIDE, SIDE)
    return random_scene(rng, size[::-1] if upright else size, bool(plain))


def _arrange(
    rng: np.random.Generator, picture: tuple[int, int]
) -> tuple[list[tuple[str, str, str]], np.ndarray]:
    """Kinds (color, shape, size) and integer boxes [N, 4] of objects that hardly touch."""
    count = int(rng.integers(2, 7))
    kinds: list[tuple[str, str, str]] = []
    boxes: list[tuple[int, int, int, int]] = []
    attempts = 0
    while len(boxes) < count and attempts < 60:
        attempts += 1
        u = rng.random(6)
        size = "small" if u[0] < 0.5 else "large"
        if (
            kinds and u[1] < 0.28
        ):  # a rival: an earlier object's colour and shape, often not its size
            color, shape, size = kinds[int(u[2] * len(kinds))]
            if u[0] < 0.7:
                size = "large" if size == "small" else "small"
        else:
            color = list(COLORS)[int(u[2] * len(COLORS))]
            shape = SHAPES[int(u[3] * len(SHAPES))]
        low, high = SIZES[size]
        side = int(rng.integers(low, high + 1))
        x0 = 1 + int(u[4] * (picture[1] - 1 - side))
        y0 = 1 + int(u[5] * (picture[0] - 1 - side))
        box = (x0, y0, x0 + side, y0 + side)
        if all(_overlap(box, other) <= 0.06 for other in boxes):
            kinds.append((color, shape, size))
            boxes.append(box)
    return kinds, np.array(boxes)


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection of two boxes over the smaller one's area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) ** 2, (b[2] - b[0]) ** 2)


def _expressions(
    kinds: list[tuple[str, str, str]], boxes: np.ndarray, rng: np.random.Generator
) -> list[list[Expression]]:
    """What can be said about each object: at most one sentence of tier 1 or 2, two of tier 3."""
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2.0
    rivals: dict[tuple[str, str], list[int]] = {}
    for i, (color, shape, _) in enumerate(kinds):
        rivals.setdefault((color, shape), []).append(i)
    anchors = [members[0] for members in rivals.values() if len(members) == 1]
    result = []
    for i, (color, shape, size) in enumerate(kinds):
        noun, others = f"{color} {shape}", [j for j in rivals[color, shape] if j != i]
        if not others:
            result.append([Expression(f"the {noun}", 1, (color, shape))])
            continue
        sentences = []
        if all(kinds[j][2] != size for j in others):
            sentences.append(Expression(f"the {size} {noun}", 2, (color, shape, size)))
        places = []
        for word, (axis, sign, forms) in PLACES.items():
            ahead = min(sign * (centers[i, axis] - centers[j, axis]) for j in others)
            if ahead >= MARGIN:
                places += [Expression(f.format(noun), 3, (color, shape, word)) for f in forms]
        relations = []
        for anchor in anchors:
            anchor_noun = " ".join(kinds[anchor][:2])
            for word, (axis, sign) in RELATIONS.items():
                ahead = sign * (centers[:, axis] - centers[anchor, axis])
                sideways = abs(centers[i, 1 - axis] - centers[anchor, 1 - axis])
                if ahead[i] >= max(MARGIN, sideways / 2) and all(ahead[others] <= -MARGIN / 2):
                    text = f"the {noun} {word} the {anchor_noun}"
                    words = (color, shape, word, *kinds[anchor][:2])
                    relations.append(Expression(text, 3, words))
        for choices in (places, relations):
            if choices:
                sentences.append(choices[int(rng.integers(len(choices)))])
        if len(sentences) > 1 and sentences[0].tier == 2 and rng.random() < 0.5:
            del sentences[1:]  # else tier 3 would be half of all
        result.append(sentences)
    return result


def _draw(
    kinds: list[tuple[str, str, str]],
    boxes: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    plain: bool,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The picture and the visible pixels of each object; later objects lie on top."""
    canvas = np.empty((*size, 3), np.float32)
    if plain:
        grey, spread, noise = rng.uniform(0.0, 255.0), 25, int(rng.integers(3))
        canvas[:] = grey + rng.choice((0.0, 25.0)) * rng.uniform(-1.0, 1.0, 3)
    else:
        spread, noise = 12, 4
        base = rng.uniform(88.0, 112.0, 3).astype(np.float32)
        rows, columns = (np.linspace(0.0, 64.0, n, dtype=np.float32) for n in size)
        canvas[..., 0] = base[0] + columns[None, :]  # red grows to the right, blue downwards
        canvas[..., 1] = base[1]
        canvas[..., 2] = base[2] + rows[:, None]
    masks: list[np.ndarray] = []
    for (color, shape, _), (x0, y0, x1, y1) in zip(kinds, boxes.tolist(), strict=True):
        alpha = _coverage(shape, x1 - x0)
        drift = rng.uniform(-spread, spread, 3).astype(np.float32)
        patch = canvas[y0:y1, x0:x1]
        patch += alpha[..., None] * (np.array(COLORS[color], np.float32) + drift - patch)
        mask = np.zeros(size, bool)
        mask[y0:y1, x0:x1] = alpha > 0.5
        for below in masks:
            below &= ~mask
        masks.append(mask)
    canvas += rng.integers(-noise, noise + 1, canvas.shape, np.int8)
    return np.clip(canvas, 0, 255).astype(np.uint8), masks


def _coverage(shape: str, side: int) -> np.ndarray:
    """How much of each pixel of a [side, side] square the shape covers, in 0..1, edges smoothed."""
    if shape == "square":
        return np.ones((side, side), np.float32)
    center = np.arange(side, dtype=np.float32) + 0.5
    x, y = center[None, :] - side / 2, center[:, None]
    if shape == "circle":
        distance = side / 2 - np.hypot(x, y - side / 2)
    else:  # an upright triangle, apex in the middle of the upper side
        distance = (y / 2 - np.abs(x)) / np.sqrt(1.25)
    return np.clip(distance + 0.5, 0.0, 1.0).astype(np.float32)


# --- on disk, in RefCOCO's layout -----------------------------------------------------------------

SPLITS = ("train", "val", "testA", "testB")
DESCRIPTION = "generated shapes"


def drawn_in(directory: str | Path) -> dict[str, Any] | None:
    """What generated scenes a directory holds, `{"description", "scenes", "seed"}`; {} if they are
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

    Every split has pictures of its own. In training, one in three has another shape or a plain
    background, so that the model is not lost on pictures of one's own. Training says none of the
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
    unfinished = refs_file.with_suffix(".unfinished")
    unfinished.write_bytes(pickle.dumps(refs, protocol=2))
    unfinished.rename(refs_file)


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
    whole = [(_coverage(o.shape, side + faint) > 0.5).sum() for faint in range(3)]
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
