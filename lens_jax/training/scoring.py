"""A run's evaluations on its held-out split: scores, a file of rows, sample pictures."""

import base64
import dataclasses
import json
import math
from typing import Any

import numpy as np

from lens_jax import files
from lens_jax.data.evaluation_batches import EvaluationRow
from lens_jax.data.prompts import box_to_pixels
from lens_jax.distribution import processes, sharding
from lens_jax.evaluation import Row, evaluate
from lens_jax.progress import Bar, counted
from lens_jax.reports import drawing
from lens_jax.training.job import Job, say, stop_if_asked
from lens_jax.training.metrics import EVALUATIONS, read_scores


def score(job: Job, point: str) -> None:
    """Evaluates on the held-out split, once: evaluation.json, a file of rows, sample pictures."""
    file = job.directory / "evaluation.json"
    scores = processes.by_main(lambda: read_scores(file))
    if point in scores:
        return
    job.lens.state = job.params
    if sharding.num_parts(job.mesh) > 1:  # gathered once, and not for every token
        job.lens.state = job.reshard(job.params)
    total = job.held_out.num_expressions
    shown = {round(i) for i in np.linspace(0, total - 1, min(job.config.samples, total))}
    drawn: dict[int, dict[str, Any]] = {}

    def batches(data):
        for batch in Bar(
            data,
            desc=f"evaluating {EVALUATIONS[point]}",
            unit="batch",
            disable=not processes.is_main(),
            compiles=not job.evaluated,
        ):
            stop_if_asked(job.stopping)
            yield batch

    def show(row: Row, asked: EvaluationRow, mask: np.ndarray) -> None:
        if row.number in shown:
            box = row.box and box_to_pixels(row.box, mask.shape, asked.coordinate_scale).tolist()
            packed = base64.b64encode(np.packbits(mask)).decode()
            drawn[row.number] = {"box": box, "mask": packed}

    data = job.config.data
    scores[point], rows = evaluate(
        job.lens,
        job.held_out,
        dataset=data.dataset,
        split=data.eval_split,
        progress=batches,
        show=show,
    )
    job.lens.state = job.params
    job.evaluated = True
    drawn = dict(item for part in processes.gather(list(drawn.items())) for item in part)
    if processes.is_main():
        for number, answer in sorted(drawn.items()):
            _show(job, point, rows[number], **answer)
        folder = job.directory / "evaluation"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in rows]
        files.write_text(folder / f"{point}.jsonl", "".join(lines))
        files.write_text(file, json.dumps(scores, indent=2) + "\n")
    boxes = scores[point]["box_iou"]
    say(
        f"{EVALUATIONS[point]}: {'' if boxes is None else f'box IoU {boxes:.3f}, '}"
        f"gIoU {scores[point]['giou']:.3f}, cIoU {scores[point]['ciou']:.3f} "
        f"on {counted(len(rows), 'held-out sample')}"
    )


def _show(job: Job, point: str, row: Row, box: list[float] | None, mask: str) -> None:
    """A sample picture with an answer: a box in pixels, and a mask's packed bits in base64."""
    sample, expression = job.held_out.expression(row.number)
    size = sample.image.shape[:2]
    bits = np.frombuffer(base64.b64decode(mask), np.uint8)
    mask = np.unpackbits(bits, count=math.prod(size)).reshape(size).astype(bool)
    answer = drawing.Answer(EVALUATIONS[point], row.completion, box, mask, row.box_iou, row.iou)
    drawing.add_panel(
        job.directory / "samples" / f"{row.number:05d}.png",
        sample.image,
        expression,
        sample.box,
        sample.mask,
        answer,
    )
