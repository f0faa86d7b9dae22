"""Curves of several runs over each other: `python launch/compare.py --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interrupts

if __name__ == "__main__":
    interrupts.quit_at_once()

from lens_jax import cli

EXAMPLE = """\
example:
  python launch/compare.py runs/tiny runs/short --output compare.html"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Flags(
        prog="launch/compare.py",
        description="Writes one page with the curves, scores and differing keys of several runs.",
        epilog=EXAMPLE,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--output", type=Path, help="the page to write; has to be given")
    try:
        options = parser.parse_args(argv)
        if options.output is None:
            raise cli.UsageError("give --output, the page to write")
        from lens_jax.training import metrics, report

        for run in options.runs:
            if not (run / "metrics.jsonl").is_file():
                raise cli.UsageError(f"{run} is no run: metrics.jsonl is missing")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        try:
            print(report.compare(options.runs, options.output))
        except metrics.RunError as error:
            raise cli.UsageError(str(error)) from error
    except (cli.UsageError, OSError) as error:
        return cli.complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
