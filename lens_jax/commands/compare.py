"""Curves of several runs over each other: `python launch/compare.py --help`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lens_jax import progress
from lens_jax.commands import cli
from lens_jax.flags import Flags

EXAMPLE = """\
example:
  python launch/compare.py runs/tiny runs/short --output compare.html"""


def compare(options: argparse.Namespace) -> None:
    from lens_jax.reports import comparison
    from lens_jax.training import metrics

    for run in options.runs:
        if not (run / "metrics.jsonl").is_file():
            raise cli.UsageError(f"{run} is no run: metrics.jsonl is missing")
    if len({run.resolve() for run in options.runs}) < len(options.runs):
        raise cli.UsageError("a run is given twice: name each once")
    cli.check_writable(options.output)
    try:
        for text in comparison.write(options.runs, options.output):
            progress.write(f"warning: {text}")
    except metrics.RunError as error:
        raise cli.UsageError(str(error)) from error
    print(options.output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Flags(
        prog="launch/compare.py",
        description=(
            "Writes one page with the curves, scores and differing keys of several runs.\n"
            "Warns where scores or curves are of different data."
        ),
        epilog=EXAMPLE,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run directories.")
    parser.add_argument("--output", type=Path, required=True, help="The page to write.")
    return cli.run_flags(compare, parser, argv)
