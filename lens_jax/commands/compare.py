"""Curves of several runs over each other: `python launch/compare.py --help`."""

from collections.abc import Sequence
from pathlib import Path

from lens_jax import progress
from lens_jax.commands import cli

EXAMPLE = """\
  python launch/compare.py runs/tiny runs/short --output compare.html"""


def compare(runs: Sequence[Path], output: Path) -> None:
    """Writes one page with the curves, scores and differing keys of several runs.

    Warns where scores or curves are of different data.

    Args:
        output: The page to write.
    """
    from lens_jax.reports import comparison
    from lens_jax.training import metrics

    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise cli.UsageError(f"{run} is no run: metrics.jsonl is missing")
    if len({run.resolve() for run in runs}) < len(runs):
        raise cli.UsageError("a run is given twice: name each once")
    cli.check_writable(output)
    try:
        for text in comparison.write(runs, output):
            progress.write(f"warning: {text}")
    except metrics.RunError as error:
        raise cli.UsageError(str(error)) from error
    print(output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser_of(compare, prog="launch/compare.py", example=EXAMPLE, skip=["runs"])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Run directories.")
    return cli.call(compare, parser, argv)
