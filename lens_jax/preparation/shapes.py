"""Coloured shapes with expressions that name one of them: a data set anyone can generate.

A scene has two to six circles, squares and triangles on a background whose weak colour gradient
tells where on the image one is, or on a plain one. Expressions come in three tiers, and the words
of a tier are needed to tell the objects apart:

1. colour and shape: "the red circle";
2. with the size: "the small blue square";
3. with a place or a relation: "the left red circle", "the green triangle above the blue square".
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, UInt8

from lens_jax.data.boxes import mask_box

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
        size: (height, width) of the image in pixels.
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
        objects.append(ShapeObject(color, shape, size, mask_box(mask), mask, tuple(sentences)))
    return Scene(image, tuple(objects))


def varied_scene(rng: np.random.Generator) -> Scene:
    """A scene as images of one's own may be: sides of 64 to 112 and 112, mostly plain."""
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
    """Expressions for each object: at most one of tier 1 or 2, and two of tier 3."""
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
    """The image and the visible pixels of each object; later objects lie on top."""
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
        alpha = coverage(shape, x1 - x0)
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


def coverage(shape: str, side: int) -> np.ndarray:
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
