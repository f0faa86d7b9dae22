"""One page about several runs, and what makes their numbers incomparable."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lens_jax import files
from lens_jax.config.keys import flatten
from lens_jax.reports import charts, pages
from lens_jax.training import metrics
from lens_jax.training.metrics import EVALUATIONS

# Keys of config.yaml that say which samples are scored, and which are trained on.
ASKED = ("data.dataset", "data.eval_split", "data.reasoning")
SCORED = ("data.eval_limit", "data.shapes.eval_scenes", "data.shapes.seed")
TRAINED = (
    "data.dataset",
    "data.split",
    "data.mixture",
    "data.mixture_weights",
    "data.curriculum",
    "data.reasoning",
    "data.shapes.train_scenes",
    "data.shapes.seed",
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A run as the files in its directory describe it."""

    directory: Path
    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]  # flat: data.dataset and so on
    point: str | None  # its last evaluation, of `EVALUATIONS`
    scores: dict[str, Any]

    @classmethod
    def read(cls, directory: Path, name: str) -> "Compared":
        evaluation = metrics.read_scores(directory / "evaluation.json")
        point = next((key for key in reversed(EVALUATIONS) if key in evaluation), None)
        config = _read_config(directory / "config.yaml")
        rows = metrics.read(directory)
        return cls(directory, name, rows, config, point, evaluation.get(point, {}))

    @property
    def data_dir(self) -> str | None:
        """Where the data lies; None where the run draws it, or where that is not known."""
        drawn = self.config.get("data.shapes.train_scenes") and "refcoco" in (
            self.config.get("data.dataset"),
            *(self.config.get("data.mixture") or ()),
        )
        place = None if drawn else self.config.get("data.data_dir")
        return place and os.path.abspath(place)

    def asked(self) -> list[tuple[str, str]] | None:
        """Image and expression of every sample scored, in order; None if not known.

        Scenes that a run draws are numbered after those it trains on: their expressions tell.
        """
        file = self.directory / "evaluation" / f"{self.point}.jsonl"
        if not file.is_file():
            return None
        try:
            rows = [json.loads(line) for line in file.read_bytes().splitlines()]
            drawn = self.data_dir is None
            return [
                ("" if drawn else os.path.basename(row["image"]), row["expression"]) for row in rows
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise metrics.RunError(f"{file} holds no rows of an evaluation ({error})") from error


def write(run_dirs: Sequence[Path], file: Path) -> list[str]:
    """Writes the page: a chart for each number of each stage with a line for each run, the last
    scores, and the keys in which configurations differ.

    Returns what makes numbers incomparable, a line each; the page says it, too.

    Raises:
        RunError: a file of a run cannot be read.
    """
    names = [run.resolve().name for run in run_dirs]
    if len(set(names)) < len(names):
        names = [str(run) for run in run_dirs]
    runs = [Compared.read(run, name) for run, name in zip(run_dirs, names, strict=True)]
    warnings = [text for other in runs[1:] for text in differences_of_data(runs[0], other)]
    page = pages.render(
        "reports/compare.html",
        runs=names,
        warnings=warnings,
        evaluated=[EVALUATIONS.get(run.point, "–") for run in runs],
        scores=[
            (score, [pages.show(key, run.scores) for run in runs])
            for key, score in pages.SCORES.items()
            if score.is_fraction and any(run.scores.get(key) is not None for run in runs)
        ],
        differences=_differing(runs),
        stages=[
            (title, charts.one_stage({run.name: run.rows for run in runs}, stage))
            for stage, title in metrics.STAGE_TITLES.items()
        ],
        **charts.LAYOUT,
    )
    files.write_text(file, page)
    return warnings


def differences_of_data(first: Compared, other: Compared) -> list[str]:
    """Why the scores, and the curves, of two runs are of different data; nothing if they are not.

    Rows of the evaluations, where both runs have them, tell better than configurations do.
    """
    both = f"{first.name} and {other.name}"
    a, b = first.asked(), other.asked()
    scored = _apart(first, other, ASKED if a and b else (*ASKED, *SCORED))
    if a and b and a != b:
        alike = sum(x == y for x, y in zip(a, b, strict=False))
        scored.append(f"{alike:,} samples alike of {len(a):,} and {len(b):,}")
    elif (n := first.scores.get("samples")) != (m := other.scores.get("samples")) and n and m:
        scored.append(f"samples {n:,} and {m:,}")
    trained = _apart(first, other, TRAINED)
    if first.data_dir and other.data_dir and first.data_dir != other.data_dir:
        place = f"data.data_dir {first.data_dir} and {other.data_dir}"
        scored.append(place)
        trained.append(place)
    found = (
        ("scores cannot be compared: they are of different held-out data", scored),
        ("curves are of different training data", trained),
    )
    return [f"{both}: {what} ({'; '.join(why)})" for what, why in found if why]


def _apart(first: Compared, other: Compared, keys: Sequence[str]) -> list[str]:
    """The keys that both configurations have with different values, with these values."""
    return [
        f"{key} {first.config[key]} and {other.config[key]}"
        for key in keys
        if key in first.config and key in other.config and first.config[key] != other.config[key]
    ]


def _differing(runs: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Keys that are not the same in all configurations, with their values."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    table = [(key, [str(run.config.get(key, "–")) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_bytes()) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise metrics.RunError(f"{file} cannot be read: {reason}") from error
    return flatten(values) if isinstance(values, dict) else {}
