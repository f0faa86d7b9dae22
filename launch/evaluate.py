"""Scores a checkpoint on a data set: `python launch/evaluate.py --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import cli

EXAMPLE = """\
  python launch/evaluate.py --checkpoint runs/tiny/final --dataset refcoco --split val \\
      --data_dir runs/tiny/data --limit 200 --output scores.json"""

# Key of the scores -> heading of the table, and how the value is written.
COLUMNS = {
    "dataset": ("data set", "{}"),
    "split": ("split", "{}"),
    "samples": ("samples", "{:,}"),
    "ciou": ("cIoU", "{:.3f}"),
    "giou": ("gIoU", "{:.3f}"),
    "box_iou": ("box IoU", "{:.3f}"),
    "precision_at_0.5": ("P@0.5", "{:.3f}"),
    "format_rate": ("format", "{:.3f}"),
    "seconds": ("seconds", "{:.0f}"),
}


def evaluate(
    checkpoint: Path,
    dataset: Literal[
        "refcoco",
        "refcoco+",
        "refcocog",
        "refclef",
        "reason_seg",
        "grounding_suite",
        "tfds_ref_coco",
        "folder",
    ],
    split: str,
    data_dir: Path,
    reasoning: bool = False,
    batch_size: PositiveInt = 16,
    limit: PositiveInt | None = None,
    max_length: PositiveInt = 768,
    official_masks: bool = False,
    output: Path | None = None,
    rows: Path | None = None,
) -> None:
    """Decodes every expression of a split greedily and scores masks and boxes.

    Args:
        checkpoint: A pretrained checkpoint, such as runs/tiny/final.
        dataset: The data set.
        split: train, val, testA, testB; test for refcocog and reason_seg; any that a manifest
            names; CONFIG/SPLIT for tfds_ref_coco. grounding_suite is one file, whatever the name.
        data_dir: The folder that holds refer_seg/, reason_seg/ReasonSeg/, ref_coco/,
            manifest.jsonl, or GroundingSuite-Eval.jsonl and coco/unlabeled2017/.
        reasoning: Ask for a line of thought before the answer.
        batch_size: Expressions decoded together.
        limit: Score only so many expressions, the first ones.
        max_length: Tokens of prompt and completion together at most.
        official_masks: Count pixels that several polygons of one object cover as background.
        output: Write the scores as JSON.
        rows: Write one JSON object for each expression; data.curriculum of a run can read it.
    """
    import dataclasses
    import json
    from functools import partial

    from tqdm import tqdm

    from lens_jax import checkpoints, evaluation, inference
    from lens_jax.data.pipeline import Evaluation
    from lens_jax.data.sources import open_source

    checkpoints.read_config(checkpoint)
    try:
        source = open_source(
            dataset, split, data_dir, evaluation=True, official_masks=official_masks
        )
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    for file in filter(None, (output, rows)):
        file.parent.mkdir(parents=True, exist_ok=True)

    lens = inference.Lens.from_pretrained(checkpoint)
    data = Evaluation(
        source,
        lens.processor,
        min(batch_size, limit or batch_size, sum(source.num_expressions)),
        # Masks are compared at original size, and of the truth only the box goes with the batch.
        buckets=dataclasses.replace(inference.BUCKETS, answer_tokens=range(64, 8192, 64)),
        limit=limit,
        max_length=max_length,
        reasoning=reasoning,
    )
    progress = partial(tqdm, desc=f"{dataset} {split}", unit="batch", dynamic_ncols=True)
    scores, outcomes = evaluation.evaluate(
        lens, data, dataset=dataset, split=split, progress=progress
    )
    if rows is not None:
        lines = [
            json.dumps(
                dataclasses.asdict(row) | {"total_reward": row.total_reward}, ensure_ascii=False
            )
            for row in outcomes
        ]
        rows.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if output is not None:
        output.write_text(json.dumps(scores, indent=2) + "\n")
    print(table([scores]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Scores as lines of a table, numbers to the right."""
    lines = [[heading for heading, _ in COLUMNS.values()]]
    for scores in results:
        cells = COLUMNS.items()
        lines.append(["–" if scores[k] is None else f.format(scores[k]) for k, (_, f) in cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(evaluate, argv, prog="launch/evaluate.py", example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
