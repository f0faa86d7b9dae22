"""report.html: one self-contained page about a run, from the files in its directory alone."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from lens_jax import files
from lens_jax.reports import charts, drawing, pages
from lens_jax.training import metrics
from lens_jax.training.metrics import EVALUATIONS


def write(run_dir: str | os.PathLike[str]) -> Path:
    """Writes RUN_DIR/report.html from metrics.jsonl, evaluation.json, config.yaml and samples/;
    what is missing is left out. Returns the file."""
    run_dir = Path(run_dir)
    rows = metrics.read(run_dir)
    evaluation = metrics.read_scores(run_dir / "evaluation.json")
    config = run_dir / "config.yaml"
    page = pages.render(
        "reports/report.html",
        name=run_dir.resolve().name,
        headline=headline(evaluation),
        stages=[
            (title, sum(row["stage"] == stage for row in rows))
            for stage, title in metrics.STAGE_TITLES.items()
        ],
        columns=[title for key, title in EVALUATIONS.items() if key in evaluation],
        table=table(evaluation),
        charts=charts.both_stages(rows),
        samples=[_sample(file) for file in sorted((run_dir / "samples").glob("*.png"))],
        config=config.read_text() if config.is_file() else "",
        hardware=hardware(),
        **charts.LAYOUT,
    )
    return files.write_text(run_dir / "report.html", page)


def headline(evaluation: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(score, first, last) of the box and the mask, where both were measured."""
    if len(measured := _measured(evaluation)) < 2:
        return []
    pairs = {key: (measured[0].get(key), measured[-1].get(key)) for key in ("box_iou", "giou")}
    return [(pages.SCORES[key].label, *pair) for key, pair in pairs.items() if None not in pair]


def table(evaluation: dict[str, Any]) -> list[tuple[pages.ShownScore, list[str], float | None]]:
    """Rows of the before/after table: score, cells, and the change of a fraction as far as it is
    shown; all of them are better when they rise."""
    rows = []
    for key, score in pages.SCORES.items():
        values = [scores.get(key) for scores in _measured(evaluation)]
        if all(value is None for value in values):
            continue
        cells = [pages.show(key, scores) for scores in _measured(evaluation)]
        change = None
        if score.is_fraction and len(values) > 1 and None not in (values[0], values[-1]):
            change = round(values[-1] - values[0], 3)
        rows.append((score, cells, change))
    return rows


def hardware() -> list[tuple[str, str]]:
    """The machine that made the page, where the run's last process ran."""
    kinds = [d.device_kind for d in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return [
        ("devices", f"{devices} ({jax.default_backend()})"),
        ("processes", str(jax.process_count())),
        ("host", f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}"),
        ("software", f"jax {jax.__version__}, Python {platform.python_version()}"),
    ]


def _measured(evaluation: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The scores of each evaluation, in the order they happened."""
    return [evaluation[key] for key in EVALUATIONS if key in evaluation]


def _sample(file: Path) -> dict[str, Any]:
    """A sample's text, and its panels as data URIs."""
    info = drawing.read_info(file)
    panels = []
    with Image.open(file) as sheet:
        for panel in info["panels"]:
            x, y, w, h = panel["at"]
            uri = pages.data_uri(sheet.crop((x, y, x + w, y + h)))
            panels.append(panel | {"uri": uri, "scores": drawing.scores(panel), "size": (w, h)})
    return {"expression": info["expression"], "panels": panels}
