"""Scenes as the tiny SAM learns them: batches of images, and prompts for the objects in them."""

import dataclasses

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from lens_jax.models.sam.config import Sam2Config
from lens_jax.preparation import shapes

CONFIG = Sam2Config(
    image_size=128,
    embed_dim=16,
    num_heads=1,
    stages=(1, 2, 3, 1),
    global_att_blocks=(5,),
    window_spec=(8, 4, 8, 4),
    d_model=64,
    decoder_heads=4,
    decoder_mlp_dim=128,
    iou_head_hidden_dim=64,
)
SCALE = CONFIG.image_size / shapes.SIDE
KINDS = [(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES]
# Ways to prompt for an object: labels of the tokens. "+" ends the list as SAM 2's predictor does.
PROMPTS = {
    "point": (1,),
    "point+": (1, -1),
    "box": (2, 3),
    "points": (1, 1, 1),
    "points+": (1, 1, -1),
    "box+": (2, 3, -1),
    "box, point": (2, 3, 1),
}
# Prompts of one length go through the decoder together.
LENGTHS = sorted({len(labels) for labels in PROMPTS.values()})


def prompts_of(length: int) -> list[str]:
    return [prompt for prompt, labels in PROMPTS.items() if len(labels) == length]


@struct.dataclass
class PromptTargets:
    """The meaning of `G` prompts of one length."""

    masks: Bool[Array, "B G S S"]
    boxes: Float[Array, "B G 4"]  # xyxy, fractions of the image's side
    kinds: Int[Array, "B G"]


@struct.dataclass
class SceneBatch:
    """Images with the kind of what covers each mask cell, and prompts of every length.

    Prompts are ordered by way of prompting, `G` an image in all.
    """

    pixels: UInt8[Array, "B A A 3"]
    cover: Int[Array, "B h w"]  # 0 background, else 1 + index into KINDS
    points: tuple[Float[Array, "B G N 2"], ...]
    targets: tuple[PromptTargets, ...]


def draw_batch(rng: np.random.Generator, images: int, objects: int) -> SceneBatch:
    """New scenes; `objects` prompts of each way an image, objects drawn with replacement.

    Half of the images have other proportions or plain backgrounds; SAM sees each as a square.
    """
    scenes = [
        _squared(shapes.random_scene(rng) if i % 2 else shapes.varied_scene(rng))
        for i in range(images)
    ]
    side = (CONFIG.image_size, CONFIG.image_size)
    pixels = [
        np.asarray(Image.fromarray(s.image).resize(side, Image.Resampling.BILINEAR)) for s in scenes
    ]
    cover = np.zeros((images, shapes.SIDE, shapes.SIDE), np.int32)
    for row, scene in zip(cover, scenes, strict=True):
        for o in scene.objects:
            row[o.mask] = 1 + KINDS.index((o.color, o.shape))
    cells = ((np.arange(CONFIG.mask_size) + 0.5) * shapes.SIDE / CONFIG.mask_size).astype(int)
    points, targets = [], []
    for length in LENGTHS:
        drawn = [
            [
                (prompt, scene.objects[i])
                for prompt in prompts_of(length)
                for i in rng.integers(len(scene.objects), size=objects)
            ]
            for scene in scenes
        ]
        points.append([[_points(rng, o, PROMPTS[prompt]) for prompt, o in row] for row in drawn])
        targets.append(
            PromptTargets(
                np.array([[o.mask for _, o in row] for row in drawn]),
                np.array([[o.box / shapes.SIDE for _, o in row] for row in drawn], np.float32),
                np.array([[KINDS.index((o.color, o.shape)) for _, o in row] for row in drawn]),
            )
        )
    return SceneBatch(
        np.stack(pixels),
        cover[:, cells[:, None], cells],
        tuple(np.array(x, np.float32) for x in points),
        tuple(targets),
    )


def _squared(scene: shapes.Scene) -> shapes.Scene:
    """The scene with its objects stretched to 112 x 112; the image stays as it is."""
    height, width = scene.image.shape[:2]
    rows, columns = ((np.arange(shapes.SIDE) * n) // shapes.SIDE for n in (height, width))
    scale = shapes.SIDE / np.array([width, height, width, height])
    objects = tuple(
        dataclasses.replace(o, mask=o.mask[rows[:, None], columns], box=o.box * scale)
        for o in scene.objects
    )
    return shapes.Scene(scene.image, objects)


def _points(
    rng: np.random.Generator, shape: shapes.ShapeObject, labels: tuple[int, ...]
) -> Float[np.ndarray, "N 2"]:
    """Points inside the object and corners of its box, in pixels of the model's image."""
    x0, y0, x1, y1 = shape.box
    # Half of the boxes are off by up to a sixth of the object's side, the others by a pixel.
    jitter = min(x1 - x0, y1 - y0) / 6 if rng.random() < 0.5 else 1.0
    corners = np.array([[x0, y0], [x1, y1]]) + rng.uniform(-jitter, jitter, (2, 2))
    corners = np.clip(corners, 0, shapes.SIDE)
    inside = np.argwhere(shape.mask)[:, ::-1]
    result = np.zeros((len(labels), 2))
    for i, label in enumerate(labels):
        if label == 1:
            result[i] = inside[rng.integers(len(inside))] + 0.5
        elif label in (2, 3):
            result[i] = corners[label - 2]
    return result * SCALE - 0.5
