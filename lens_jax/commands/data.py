"""Data sets of one's own, checked and converted: `python launch/data.py --help`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lens_jax.commands import cli
from lens_jax.progress import counted

# isort: split
from tqdm import tqdm

from lens_jax.flags import NonNegativeInt

DESCRIPTION = """\
A data set of your own is a folder with manifest.jsonl, one object a line (docs/own_data.md):
  {"image": "photos/a.jpg", "expressions": ["the left cup"], "mask": "masks/a.png"}"""

CHECK = """\
  python launch/data.py check --data_dir my_data --checkpoint lens"""
CONVERT = """\
  python launch/data.py convert --from labelme --data_dir photos --output my_data
  python launch/data.py convert --from refcoco --dataset refcocog --data_dir D --output my_data"""


def check(
    data_dir: Path,
    page: Path | None = None,
    thumbnails: NonNegativeInt = 120,
    checkpoint: Path | None = None,
    reasoning: bool = False,
    coordinates: Literal["auto", "pixels"] = "auto",
) -> int:
    """Reads every row of a data set of your own as training will, and says what is wrong.

    A table counts rows by split, usable and unusable, and names each kind of problem with the first
    row that has it. A page shows pictures with their masks and lists every row that cannot be used.
    Exit code 2 if there are such rows; what is only to be looked at (duplicates, pictures in two
    splits, boxes that do not fit their masks) leaves it at 0.

    Args:
        data_dir: The folder that holds manifest.jsonl.
        page: Where to write the page; DATA_DIR/check.html without it.
        thumbnails: Pictures on the page at most.
        checkpoint: A pretrained checkpoint: says which buckets its training needs for all rows.
        reasoning: These are for training that asks for a line of thought before the answer.
        coordinates: auto calls coordinates percent where chance does not explain that none in a
            split or folder is over 100; pixels says that they are pixels.
    """
    from lens_jax import checkpoints
    from lens_jax.preparation import checking

    if checkpoint is not None:
        checkpoints.read_config(checkpoint)
    try:
        bar = partial(tqdm, desc="checking", unit="row", dynamic_ncols=True)
        report = checking.check(data_dir, bar, coordinates=coordinates)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    page = page or data_dir / "check.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(checking.page(report, thumbnails), encoding="utf-8")
    counts = report.counts()
    print(cli.table([list(counts[0]), *(list(row.values()) for row in counts)]))
    for title, problems in (("unusable", report.errors()), ("to look at", report.notes())):
        if problems:
            print("\n" + cli.table([[title, "rows", "the first one"], *problems], left=(0, 2)))
    if len(report.splits) == 1:
        only = f"no split but {report.splits[0]}: training needs one to evaluate on"
        print(f"\n{only} (data.eval_split)")
    if checkpoint is not None and report.unusable < len(report.verdicts):
        from lens_jax.data.processor import Processor

        processor = Processor.from_pretrained(checkpoint)
        needed = checking.buckets(report, processor, reasoning=reasoning)
        flags = " ".join(f"--data.{key} '{value}'" for key, value in needed.items())
        print(f"\nall usable rows fit into {flags}")
        if count := checking.shrunken(report, needed["canvas"][0]):
            print(
                f"{count:,} of them with a mask shrunken to that canvas: SAM's picture is no "
                "larger (shrunken_masks of metrics.jsonl)"
            )
    print(f"\npictures and all rows that cannot be used: {page}")
    return 2 if report.unusable else 0


def convert(
    from_: Literal["refcoco", "reason_seg", "coco", "labelme"],
    data_dir: Path,
    output: Path,
    dataset: Literal["refcoco", "refcoco+", "refcocog", "refclef"] = "refcoco",
    resized: Literal["refuse", "scale"] = "refuse",
    boxes: Literal["auto", "xywh", "xyxy"] = "auto",
    crowds: Literal["auto", "keep"] = "auto",
    coordinates: Literal["auto", "pixels"] = "auto",
) -> None:
    """Writes a data set in another layout as one of your own: manifest.jsonl and pictures/.

    Pictures are hard links to the originals where the file system allows it, else copies. Nothing
    is left behind if it fails. What a manifest cannot say is left out, and counted by reason.
    Masks and boxes are turned upright with their pictures.

    Args:
        from_: The layout: REFER's refer_seg/, LISA's reason_seg/ReasonSeg/, COCO's .json files
            with sentences or categories, or a folder of labelme's .json files.
        data_dir: The folder that holds it, with all its pictures.
        output: The folder to write; must not exist yet, or be empty.
        dataset: Which of the data sets in refer_seg/.
        resized: What to do with the annotations of pictures that were resized afterwards, by the
            size that they say: leave them out, or scale them.
        boxes: What COCO's bbox holds, [x, y, width, height] or [x0, y0, x1, y1]; auto looks at
            masks, areas and pictures, and leaves out what they do not tell.
        crowds: auto leaves out COCO's iscrowd, but not the brush masks of CVAT and Datumaro, which
            carry it, too; keep takes all for objects.
        coordinates: auto leaves out files (of labelme, folders) of which chance does not explain
            that no coordinate is over 100: they are percent; pixels says that they are pixels.
    """
    from lens_jax.preparation import conversion

    try:
        bar = partial(tqdm, desc="converting", unit="object", dynamic_ncols=True)
        summary = conversion.convert(
            from_,
            data_dir,
            output,
            dataset=dataset,
            resized=resized,
            boxes=boxes,
            crowds=crowds,
            coordinates=coordinates,
            progress=bar,
        )
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    rows = sum(summary.rows.values())
    left_out = sum(count for _, count, _ in summary.left_out)
    lines = [["objects", "count"], *map(list, sorted(summary.rows.items()))]
    lines += [["written", rows], ["left out", left_out], ["all", rows + left_out]]
    print(cli.table(lines))
    for title, found in (("left out", summary.left_out), ("to look at", summary.remarks)):
        if found:
            print("\n" + cli.table([[title, "objects", "the first one"], *found], left=(0, 2)))
    if not rows:
        raise cli.UsageError("no object can be converted: nothing is written")
    print(f"\n{counted(rows, 'row')} and {counted(summary.pictures, 'picture')}: {output}")


COMMANDS = {"check": (check, CHECK), "convert": (convert, CONVERT)}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_one_of(COMMANDS, argv, prog="launch/data.py", description=DESCRIPTION)
