"""Scores of a model on a data set: cIoU, gIoU, box IoU (LENS, section 4; sums, not means)."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from lens_jax import interrupts
from lens_jax.data.boxes import box_iou
from lens_jax.data.evaluation_batches import Evaluation, EvaluationRow
from lens_jax.data.images import upsample_logits
from lens_jax.data.sample import Sample
from lens_jax.distribution import processes
from lens_jax.inference.lens import Lens, format_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One expression's scores. Boxes are in the text's coordinates; IoUs are fractions.

    `box_iou` is None where the data set has no box; a completion without a box scores 0. Without a
    target (no box, an empty mask) both IoUs are 1 for the right answer, no box and an empty mask,
    and 0 for any other, as rewards are.
    """

    number: int
    ref_id: int
    image: str
    expression: str
    completion: str
    box: tuple[float, ...] | None
    intersection: int
    union: int
    iou: float
    box_iou: float | None
    well_formed: bool
    ended: bool

    @property
    def total_reward(self) -> float:
        """The reward of training on RefCOCO: the squared IoUs of box and mask."""
        return (self.box_iou or 0.0) ** 2 + self.iou**2


def evaluate(
    lens: Lens,
    data: Evaluation,
    *,
    dataset: str,
    split: str,
    progress: Callable[[Iterable], Iterable] = iter,
    show: Callable[[Row, EvaluationRow, np.ndarray], None] | None = None,
) -> tuple[dict[str, Any], list[Row]]:
    """Decodes every expression greedily; returns the scores and one row for each, in order.

    `show` is called with each row, its question, and the predicted mask at original size. Each
    process decodes, scores and shows its own rows; all return all rows.
    """
    start = time.perf_counter()
    format_name = format_of(data.reasoning)
    rows, true_boxes = [], 0
    for item in progress(data):
        responses = lens.respond(item.batch.prompts, item.batch.sample_id, limit=item.limit)
        for i, asked in zip(np.flatnonzero(item.valid), item.rows, strict=True):
            interrupts.check()
            target = asked.sample.mask
            mask = upsample_logits(responses.mask_logits[i], target.shape) > 0
            intersection, union = overlap(mask, target)
            box = tuple(float(v) for v in responses.box[i]) if responses.box_found[i] else None
            true_boxes += asked.sample.box is not None
            row = Row(
                number=asked.number,
                ref_id=asked.sample.ref_id,
                image=asked.sample.image_path,
                expression=asked.expression,
                completion=lens.completion_text(responses, i),
                box=box,
                intersection=intersection,
                union=union,
                iou=intersection / (union + 1e-5) if union else 1.0,
                box_iou=_box_score(box, asked.sample, item.batch.targets.box[i]),
                well_formed=bool(responses.formats[format_name][i]),
                ended=bool(responses.ended[i]),
            )
            rows.append(row)
            if show is not None:
                show(row, asked, mask)
    if not processes.total(true_boxes)[0]:  # in a set without boxes, samples without target too
        rows = [dataclasses.replace(row, box_iou=None) for row in rows]
    rows = _of_all_processes(rows)
    scores = {"dataset": dataset, "split": split, **summarize(rows)}
    return scores | {"seconds": round(time.perf_counter() - start, 2)}, rows


def _of_all_processes(rows: list[Row]) -> list[Row]:
    """The rows of all processes, each once, in order."""
    if jax.process_count() == 1:
        return rows
    merged = {}
    for part in processes.gather([dataclasses.asdict(row) for row in rows]):
        for row in part:
            row["box"] = row["box"] and tuple(row["box"])
            merged[row["number"]] = Row(**row)
    return [merged[number] for number in sorted(merged)]


def summarize(rows: list[Row]) -> dict[str, Any]:
    """The scores of a list of rows."""
    count = len(rows)
    boxes = [row.box_iou for row in rows if row.box_iou is not None]
    intersection, union = sum(r.intersection for r in rows), sum(r.union for r in rows)
    return {
        "samples": count,
        "ciou": intersection / (union + 1e-8),
        "giou": sum(row.iou for row in rows) / (count + 1e-5),
        "box_iou": sum(boxes) / len(boxes) if boxes else None,
        "precision_at_0.5": sum(row.iou > 0.5 for row in rows) / count,
        "format_rate": sum(row.well_formed for row in rows) / count,
        "truncated": sum(not row.ended for row in rows),
    }


def overlap(mask: Bool[np.ndarray, "H W"], target: np.ndarray) -> tuple[int, int]:
    """Pixels of intersection and union; targets count where they are 1: summed polygons hold 2s."""
    target = target == 1
    return int(np.sum(mask & target)), int(np.sum(mask | target))


def _box_score(
    box: tuple[float, ...] | None, sample: Sample, target: Float[np.ndarray, "4"]
) -> float | None:
    """A completion's `Row.box_iou`; `target` is the sample's box in the text's coordinates."""
    if sample.box is not None:
        return 0.0 if box is None else box_iou(box, target)
    return None if sample.mask.any() else float(box is None)
