"""Scenes as the tiny Qwen2.5-VL learns them: images in cells, questions and answers in tokens."""

import dataclasses
import multiprocessing
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lens_jax.data import images, prompts
from lens_jax.preparation import shapes

CELL, CELLS = 28, 16  # pixels of a cell, which is a merged patch; most cells of an image
MIN_PIXELS, MAX_PIXELS = 9_000, 12_800  # preprocessor_config.json: images of 10 to 16 cells
QUESTIONS = 4  # expressions of one image trained together, sharing its tokens


@dataclasses.dataclass(frozen=True)
class Seen:
    """An image as the vision tower reads it: one window, padded to 16 cells."""

    patches: np.ndarray  # u8 [64, 3, 196], in the order of `images.window_layout`
    places: np.ndarray  # u8 [64, 2]: row and column
    mask: np.ndarray  # bool [64]
    order: np.ndarray  # u8 [16]: where each cell lies, row by row
    grid: np.ndarray  # u8 [2]: rows and columns of cells


@dataclasses.dataclass
class Pool:
    """All scenes: images, what is centred in each cell, and questions as token rows."""

    seen: Seen  # each array stacked
    cell_class: np.ndarray  # i8 [N, 16], 0: nothing
    cell_box: np.ndarray  # u8 [N, 16, 4]
    questions: list[list[tuple[str, tuple[int, ...], int]]]  # text, box, cell


def look(picture: np.ndarray) -> Seen:
    """Cuts an image u8 [H, W, 3] of whole cells, at most 16 of them."""
    rows, columns = picture.shape[0] // CELL, picture.shape[1] // CELL
    p = CELL // 2
    cut = picture.reshape(rows, 2, p, columns, 2, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    source, places, order = images.window_layout((2 * rows, 2 * columns), 4)
    patches = cut.reshape(-1, 3, p * p)[np.maximum(source[0], 0)]
    order = np.pad(order, (0, CELLS - len(order))).astype(np.uint8)
    return Seen(
        patches, places[0].astype(np.uint8), source[0] >= 0, order, np.uint8([rows, columns])
    )


def _picture(rng: np.random.Generator) -> tuple[shapes.Scene, np.ndarray]:
    """A scene, and its image as the processor hands it on.

    A third are those of `make train`. The others have one colour behind the objects, sides of up to
    1:2, or came larger or smaller and were resized by the processor: some of each, most of several.
    """
    size, plain, scale = (shapes.SIDE, shapes.SIDE), False, 1.0
    if rng.random() < 2 / 3:
        plain, narrow, resized = rng.random(3) < 0.5
        aspect = 2 ** rng.uniform(-1, 1) if narrow else 1.0
        size = tuple(round(shapes.SIDE * aspect**power) for power in (-0.5, 0.5))
        scale = rng.uniform(0.7, 2.3) if resized else 1.0
    scene = shapes.random_scene(rng, size, bool(plain))
    height, width = (round(n * scale) for n in size)
    picture = images.resize(scene.image, (height, width))
    target = images.smart_resize(height, width, MIN_PIXELS, MAX_PIXELS)
    return scene, images.resize(picture, target)


def _draw(seed: int, index: int):
    scene, picture = _picture(np.random.default_rng((seed, index)))
    rows, columns = (n // CELL for n in picture.shape[:2])
    cell_class, cell_box = np.zeros(CELLS, np.int8), np.zeros((CELLS, 4), np.uint8)
    questions = []
    if rows * columns > CELLS:
        return None, cell_class, cell_box, questions
    scale = np.tile(np.divide(picture.shape[1::-1], scene.image.shape[1::-1]), 2)
    kinds = [f"{c} {s}" for c in shapes.COLORS for s in shapes.SHAPES]
    for thing in scene.objects:
        box = tuple(int(v) for v in np.round(thing.box * scale))
        cell = (box[1] + box[3]) // 2 // CELL * columns + (box[0] + box[2]) // 2 // CELL
        cell_class[cell] = 1 + kinds.index(f"{thing.color} {thing.shape}")
        cell_box[cell] = box
        for expression in thing.expressions:
            if not shapes.is_held_out(expression):
                questions.append((expression.text, box, cell))
    return look(picture), cell_class, cell_box, questions


def make_pool(count: int, seed: int) -> Pool:
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        drawn = workers.imap(partial(_draw, seed), range(count), chunksize=64)
        rows = [row for row in tqdm(drawn, "scenes", count) if row[3]]
    seen, cell_class, cell_box, questions = zip(*rows, strict=True)
    fields = [field.name for field in dataclasses.fields(Seen)]
    stacked = Seen(**{name: np.stack([getattr(x, name) for x in seen]) for name in fields})
    return Pool(stacked, np.stack(cell_class), np.stack(cell_box), list(questions))


class Writer:
    """Token rows of questions with answers; pieces are cached, as words repeat."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encode = cache(lambda text: tuple(self.tokenizer.encode(text)))
        image = "<|vision_start|>" + "<|image_pad|>" * CELLS + "<|vision_end|>"
        self.prefix = self.encode(
            f"<|im_start|>system\n{prompts.SYSTEM}<|im_end|>\n<|im_start|>user\n{image}"
        )
        self.first_image = self.prefix.index(self.encode("<|image_pad|>")[0])

    def row(self, text: str, box: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """Tokens after the image; where the answer and where its box begin."""
        question = prompts.QUESTION.format(question=text) + "<|im_end|>\n<|im_start|>assistant\n"
        head = self.encode(question)
        echo = self.encode(f"<|object_ref_start|>{text}.<|object_ref_end|><|box_start|>")
        numbers = [self.encode(str(v)) for v in box]
        marks = [self.encode(m) for m in ("(", ",", "),(", ",", ")<|box_end|><|im_end|>")]
        coordinates = marks[0] + sum((n + m for n, m in zip(numbers, marks[1:], strict=True)), ())
        return head + echo + coordinates, len(head), len(head) + len(echo) - 1


def loosen(
    box: tuple[int, ...], rng: np.random.Generator, size: tuple[int, int]
) -> tuple[int, ...]:
    """Every side moved outwards by 5 to 45 % of the object's size, at most to the border.

    `size` is the image's, (height, width).
    """
    x0, y0, x1, y1 = box
    move = rng.uniform(0.05, 0.45, 4) * [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    moved = np.round(np.array(box) + move * [-1, -1, 1, 1])
    return tuple(int(v) for v in np.clip(moved, 0, [*size[::-1], *size[::-1]]))


def batches(pool: Pool, writer: Writer, size: int, loose: bool, seed: int) -> Iterator[dict]:
    """Endless batches: images [B], questions [B, G, S] with the spans of answers and boxes."""
    rng = np.random.default_rng((seed, int(loose)))
    length = 56
    while True:
        rows = rng.integers(len(pool.questions), size=size)
        seen = {name: array[rows] for name, array in vars(pool.seen).items()}
        tokens = np.zeros((size, QUESTIONS, length), np.int32)
        spans = np.zeros((size, QUESTIONS, 3), np.int32)  # answer, box, end
        cells = np.zeros((size, QUESTIONS), np.int32)
        for b, row in enumerate(rows):
            asked = pool.questions[row]
            order = rng.permutation(len(asked))
            for g in range(QUESTIONS):
                text, box, cells[b, g] = asked[order[g % len(order)]]
                if loose:
                    box = loosen(box, rng, tuple(CELL * int(n) for n in seen["grid"][b]))
                ids, answer, start = writer.row(text, box)
                tokens[b, g, : len(ids)] = ids
                spans[b, g] = answer, start, len(ids)
        yield dict(
            **seen,
            cell_class=pool.cell_class[rows].astype(np.int32),
            cell_box=pool.cell_box[rows].astype(np.int32),
            tokens=tokens,
            spans=spans,
            cells=cells,
        )
