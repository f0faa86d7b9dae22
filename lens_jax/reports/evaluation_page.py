"""The page of an evaluation: its best, worst and some other samples, and where the scores lie."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from lens_jax import files
from lens_jax.data.evaluation_batches import Evaluation, EvaluationRow
from lens_jax.data.prompts import box_to_pixels
from lens_jax.evaluation import Row, summarize
from lens_jax.progress import counted
from lens_jax.reports import drawing, pages

SHOWN = 8  # samples of each kind
BINS = 20  # of the histogram of IoUs
# Columns of the page's table, of which those of a group of samples hold the first four.
SHOWN_SCORES = ("samples", "ciou", "giou", "box_iou", "precision_at_0.5", "format_rate")
# Upper bounds, exclusive, of the groups that scores are split into.
SIZES = ((0.01, "under 1 %"), (0.05, "1 to 5 %"), (0.2, "5 to 20 %"), (2.0, "over 20 %"))
WORDS = ((3, "1 or 2"), (6, "3 to 5"), (11, "6 to 10"), (10**9, "11 and more"))


class Collector:
    """Collects for every expression the mask as run lengths, the box in pixels, and the fraction of
    the image that the object takes."""

    def __init__(self):
        self.masks: dict[int, dict[str, Any]] = {}
        self.boxes: dict[int, np.ndarray | None] = {}
        self.sizes: dict[int, float] = {}

    def __call__(self, row: Row, asked: EvaluationRow, mask: np.ndarray) -> None:
        self.masks[row.number] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        box = row.box and box_to_pixels(row.box, mask.shape, asked.coordinate_scale)
        self.boxes[row.number] = box
        self.sizes[row.number] = float(np.mean(asked.sample.mask == 1))


@dataclasses.dataclass(frozen=True)
class Section:
    """A data set's part of the page."""

    scores: dict[str, Any]
    galleries: list[tuple[str, list[dict[str, Any]]]]
    histogram: list[tuple[float, float, str]]  # left edge and height in 0..1, label
    groups: list[tuple[str, list[tuple[str, dict[str, Any]]]]]


def section(
    scores: dict[str, Any], rows: Sequence[Row], collected: Collector, data: Evaluation
) -> Section:
    """Draws the samples that are shown of a data set; `data` reads their images once more."""
    ranked = sorted(rows, key=lambda row: (row.iou, row.number))
    worst, best = ranked[:SHOWN], ranked[::-1][:SHOWN]
    others = random.Random(0).sample(list(rows), min(SHOWN, len(rows)))
    kinds = (("Worst", worst), ("Best", best), ("Random", sorted(others, key=lambda r: r.number)))
    pictures = {}
    for row in {row.number: row for _, chosen in kinds for row in chosen}.values():
        pictures[row.number] = _picture(row, collected, data)
    galleries = [(title, [pictures[row.number] for row in chosen]) for title, chosen in kinds]
    return Section(
        scores,
        galleries,
        histogram([row.iou for row in rows]),
        [
            (
                "Object size, of the picture",
                _grouped(rows, SIZES, lambda row: collected.sizes[row.number]),
            ),
            ("Words of the expression", _grouped(rows, WORDS, lambda r: len(r.expression.split()))),
        ],
    )


def write(file: Path, checkpoint: str, sections: Sequence[Section]) -> Path:
    """Writes one self-contained page."""
    page = pages.render(
        "reports/evaluation_page.html",
        checkpoint=checkpoint,
        sections=sections,
        bins=BINS,
        scores=pages.SCORES,
        show=pages.show,
        shown=SHOWN_SCORES,
    )
    return files.write_text(file, page)


def histogram(ious: Sequence[float]) -> list[tuple[float, float, str]]:
    """Bars of BINS equal bins over 0..1: left edge, height relative to the highest, label."""
    counts, edges = np.histogram(ious, bins=BINS, range=(0, 1))
    return [
        (
            float(edges[i]),
            float(n / max(1, counts.max())),
            f"IoU {edges[i]:.2f} to {edges[i + 1]:.2f}: {counted(int(n), 'sample')}",
        )
        for i, n in enumerate(counts)
    ]


def _grouped(
    rows: Sequence[Row], groups: Sequence[tuple[float, str]], measure: Callable[[Row], float]
) -> list[tuple[str, dict[str, Any]]]:
    """The scores of each group that has rows."""
    parts: dict[str, list[Row]] = {label: [] for _, label in groups}
    for row in rows:
        value = measure(row)
        parts[next(label for bound, label in groups if value < bound)].append(row)
    return [(label, summarize(part)) for label, part in parts.items() if part]


def _picture(row: Row, collected: Collector, data: Evaluation) -> dict[str, Any]:
    sample, _ = data.expression(row.number)
    mask = coco_mask.decode(collected.masks[row.number]).astype(bool)
    box = collected.boxes[row.number]
    drawn = drawing.overlay(sample.image, box, mask, sample.box, sample.mask == 1)
    panel = {"box": box, "box_iou": row.box_iou, "mask_iou": row.iou}
    return {
        "uri": pages.data_uri(drawn),
        "size": drawn.size,
        "expression": row.expression,
        "completion": row.completion,
        "scores": drawing.scores(panel),
        "where": f"{row.number}: {Path(row.image).name}",
    }
