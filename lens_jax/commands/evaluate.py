"""Scores a checkpoint on a data set: `python launch/evaluate.py --help`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lens_jax import interrupts
from lens_jax.commands import cli
from lens_jax.config import Dataset
from lens_jax.flags import PositiveInt

EXAMPLE = """\
  python launch/evaluate.py --checkpoint runs/tiny/final --dataset refcoco --split val \\
      --data_dir runs/tiny/data --limit 200 --output scores.json --page scores.html
  python launch/evaluate.py --checkpoint lens --data_dir data --output scores.json \\
      --suite refcoco,refcoco+:testA,reason_seg"""

# The splits that a suite evaluates of a data set named without one.
SPLITS = {
    "refcoco": ("val", "testA", "testB"),
    "refcoco+": ("val", "testA", "testB"),
    "refcocog": ("val", "test"),
    "refclef": ("val", "testA", "testB", "testC"),
    "reason_seg": ("val", "test"),
    "grounding_suite": ("all",),
}
# Tokens of prompt and completion together in the official evaluation, its data sets' default.
OFFICIAL_LENGTH = 768
# Batches prepared ahead of the one that is decoded.
AHEAD = 2

# The scores of the terminal's table.
SHOWN = ("samples", "ciou", "giou", "box_iou", "precision_at_0.5", "format_rate", "seconds")


def evaluate(
    checkpoint: Path,
    data_dir: Path,
    dataset: Dataset | None = None,
    split: str | None = None,
    suite: str | None = None,
    reasoning: bool = False,
    batch_size: PositiveInt = 8,
    devices: PositiveInt | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    limit: PositiveInt | None = None,
    max_length: PositiveInt | None = None,
    official_masks: bool = False,
    output: Path | None = None,
    rows: Path | None = None,
    page: Path | None = None,
) -> int:
    """Decodes every sample of a split greedily, a picture with one expression each, and scores
    masks and boxes.

    Ctrl-C ends it with exit code 130; of a --suite what its finished splits gave is kept.

    Args:
        checkpoint: A pretrained checkpoint, such as runs/tiny/final.
        data_dir: The folder that holds refer_seg/, reason_seg/ReasonSeg/, ref_coco/,
            manifest.jsonl, or GroundingSuite-Eval.jsonl and coco/unlabeled2017/.
        dataset: The data set; it goes with --split.
        split: train, val, testA, testB; test for refcocog and reason_seg; any that a manifest
            names; of tfds_ref_coco with a config in front, too: refcocog_google/val.
            grounding_suite is one file, whatever the name.
        suite: In place of --dataset: several, with commas between them, as DATASET:SPLIT, or
            DATASET for all of its held-out splits. The scores are then a list.
        reasoning: Ask for a line of thought before the answer.
        batch_size: Samples that a device decodes together. Scores may differ in the last places
            between sizes, as between devices.
        devices: How many devices share the work; all that are present if not given.
        precision: Of matrix products; float32 on CPU and bfloat16 elsewhere if not given.
        limit: Score only so many samples of each split, the first ones.
        max_length: Tokens of prompt and completion together at most. Not given: 768, as in the
            official code; no such limit for folder, whose pictures may be larger.
        official_masks: Count pixels that several parts of one object cover as background, as the
            official evaluation of RefCOCO and GroundingSuite does.
        output: Write the scores as JSON; of a --suite after each of its splits.
        rows: Write one JSON object for each sample; data.curriculum of a run can read it.
        page: Write an HTML page: worst, best and random samples, the distribution of IoUs, scores
            by object size and expression length.
    """
    if (dataset is None) == (suite is None):
        raise cli.UsageError("give either --dataset and --split, or --suite")
    if suite is None and split is None:
        raise cli.UsageError(f"give --split{splits_of(dataset, data_dir)}")
    if suite is not None and split is not None:
        raise cli.UsageError("--split goes with --dataset; a --suite names splits itself: a:val,b")
    wanted = [(dataset, split)] if suite is None else chosen(suite)

    import dataclasses
    import json
    from functools import partial

    import jax

    from lens_jax import checkpoints, evaluation, files, inference
    from lens_jax.config import ConfigError, MeshConfig
    from lens_jax.data.evaluation_batches import Evaluation
    from lens_jax.data.sources import open_source
    from lens_jax.distribution import sharding
    from lens_jax.inference import inputs
    from lens_jax.models import precision as precisions
    from lens_jax.progress import Bar, counted
    from lens_jax.reports import evaluation_page

    results: list[dict[str, Any]] = []
    written: list[Path] = []

    def so_far() -> str:
        where = f" in {', '.join(map(str, written))}" if written else ", nothing is written"
        return files.printable(f"{len(results)} of {counted(len(wanted), 'split')} done{where}")

    interrupts.tell(so_far)
    checkpoints.read_config(checkpoint)
    try:
        mesh = sharding.make_mesh(MeshConfig(data=devices or jax.device_count()))
        sources = [
            open_source(name, part, data_dir, evaluation=True, official_masks=official_masks)
            for name, part in wanted
        ]
    except (ValueError, ConfigError) as error:
        raise cli.UsageError(str(error).replace("mesh.data", "--devices")) from error
    wanted_files = {
        flag: file
        for flag, file in (("output", output), ("rows", rows), ("page", page))
        if file is not None
    }
    for flag, file in wanted_files.items():
        try:
            cli.check_writable(file)  # what keeps it from being written is said before the work
        except OSError as error:
            raise cli.UsageError(f"--{flag}: {files.explain(error)}") from None

    precision = precision or precisions.default()
    asked = suite or f"{dataset} {split}"
    cli.announce(checkpoint, asked, precision, devices=mesh.devices.flat)
    lines, sections = [], []
    unwritten: dict[str, OSError] = {}

    def write(flag: str, file: Path) -> None:
        if flag == "rows":
            files.write_text(file, "".join(lines))
        elif flag == "output":
            scores = results[0] if suite is None else results
            files.write_text(file, json.dumps(scores, indent=2) + "\n")
        else:
            evaluation_page.write(file, str(checkpoint), sections)

    def keep() -> None:
        """Writes what is known so far: a split that fails costs none of those before it, and a full
        disk no score."""
        unwritten.clear()
        written.clear()
        for flag, file in wanted_files.items():
            try:
                write(flag, file)
                written.append(file)
            except OSError as error:
                unwritten[flag] = error

    lens = inference.Lens.from_pretrained(checkpoint, mesh=mesh, precision=precision)
    together = batch_size * sharding.num_parts(mesh)
    for (name, part), source in zip(wanted, sources, strict=True):
        data = Evaluation(
            source,
            lens.processor,
            together,
            # Masks are compared at original size; of the truth only the box goes with the batch.
            buckets=dataclasses.replace(inputs.BUCKETS, answer_tokens=range(64, 8192, 64)),
            limit=limit,
            max_length=length_limit(name, max_length),
            reasoning=reasoning,
            prefetch=AHEAD,
        )
        progress = partial(
            Bar,
            desc=f"{name} {part}",
            unit="batch",
            dynamic_ncols=True,
            compiles=not results,
        )
        drawn = evaluation_page.Collector() if page is not None else None
        scores, outcomes = evaluation.evaluate(
            lens, data, dataset=name, split=part, progress=progress, show=drawn
        )
        with interrupts.held():
            results.append(scores)
            for row in outcomes:
                values = dataclasses.asdict(row) | {"total_reward": row.total_reward}
                where = {"dataset": name, "split": part} if suite is not None else {}
                lines.append(json.dumps(where | values, ensure_ascii=False) + "\n")
            if drawn is not None:
                sections.append(evaluation_page.section(scores, outcomes, drawn, data))
            keep()
    print(table(results))
    for scores in results:
        if scores["truncated"]:
            limit = length_limit(scores["dataset"], max_length)
            print(cut_off(scores, limit, lens.generation.max_new_tokens))
    contents = {"output": "the scores", "rows": "a row for each sample", "page": "the page"}
    for flag, file in wanted_files.items():
        if flag not in unwritten:
            print(files.printable(f"{file}: {contents[flag]}"))
    for flag, error in unwritten.items():
        cli.complain(cli.UsageError(f"--{flag}: {files.explain(error)}"))
    return 2 if unwritten else 0


def splits_of(dataset: str, data_dir: Path) -> str:
    """The splits that a data set has, as what a message about --split ends with."""
    from lens_jax.data.sources import open_source

    try:
        open_source(dataset, "", data_dir)
    except ValueError as error:
        names = str(error).partition(" is none of ")[2]
        return f", one of {names.partition(': ')[0]}" if names else f": {error}"
    return " all"


def length_limit(dataset: str, given: int | None) -> int | None:
    """Tokens of prompt and completion together at most; None: as many as the checkpoint allows."""
    return given or (None if dataset == "folder" else OFFICIAL_LENGTH)


def cut_off(scores: dict[str, Any], max_length: int | None, max_new_tokens: int) -> str:
    """How many completions of a data set were cut off, and what to change."""
    counts = f"{scores['truncated']:,} of {scores['samples']:,}"
    limits = f"the checkpoint allows {max_new_tokens:,} tokens (rollout.max_new_tokens of its run)"
    if max_length:
        limits = f"--max_length {max_length:,} counts prompt and picture, too: raise it; {limits}"
    where = f"{scores['dataset']} {scores['split']}"
    return f"{where}: {counts} completions were cut off before their end: {limits}"


def chosen(suite: str) -> list[tuple[str, str]]:
    """The data sets and splits that `--suite` names, in order."""
    wanted = []
    for item in suite.split(","):
        name, _, part = (word.strip() for word in item.partition(":"))
        if name not in get_args(Dataset):
            names = ", ".join(get_args(Dataset))
            raise cli.UsageError(
                f"--suite: expected DATASET or DATASET:SPLIT of {names}, got {item}"
            )
        if not part and name not in SPLITS:
            raise cli.UsageError(f"--suite: {name} needs a split: {name}:val, for example")
        wanted += [(name, part)] if part else [(name, split) for split in SPLITS[name]]
    return wanted


def table(results: Sequence[dict[str, Any]]) -> str:
    """Scores as a table for the terminal: a line each, or of one data set a line for each score."""
    from lens_jax.reports import pages

    lines = [["data set", "split", *(pages.SCORES[key].label for key in SHOWN)]]
    for scores in results:
        cells = (pages.show(key, scores) for key in SHOWN)
        lines.append([scores["dataset"], scores["split"], *cells])
    if len(results) == 1:
        return cli.table(list(zip(*lines, strict=True)))
    return cli.table(lines, left=(0, 1))


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(evaluate, argv, prog="launch/evaluate.py", example=EXAMPLE)
