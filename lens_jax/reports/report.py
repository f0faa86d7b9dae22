"""report.html: one self-contained page about a run, from the files in its directory alone."""

import dataclasses
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2
from PIL import Image

from lens_jax import files
from lens_jax.reports import drawing
from lens_jax.training import metrics


class Score(NamedTuple):
    """How a key of evaluation.json is shown."""

    label: str
    meaning: str
    is_fraction: bool = True  # whose rise is progress


# Evaluations in the order they happen, with their headings.
EVALUATIONS = {
    "before": "before",
    "after_alignment": f"after {metrics.STAGE_TITLES['alignment']}",
    "after_grpo": f"after {metrics.STAGE_TITLES['grpo']}",
}
SCORES = {
    "box_iou": Score("box IoU", "IoU of the written and the true box, mean over samples"),
    "giou": Score("gIoU", "IoU of the two masks, mean over samples"),
    "ciou": Score("cIoU", "all intersections of masks over all unions"),
    "precision_at_0.5": Score("precision_at_0.5", "samples with a mask IoU above 0.5"),
    "format_rate": Score("format_rate", "completions of the form that the prompt asks for"),
    "samples": Score("samples", "a picture with one expression each", False),
    "seconds": Score("seconds", "of decoding and scoring", False),
}
# Title, what it means, keys of metrics.jsonl -> label; `reward/` stands for all channels.
CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "weighted sum (total) and its channels", {"reward": "total", "reward/": ""}),
    ("IoU", "of training batches", {"box_iou": "box", "mask_iou": "mask"}),
    ("Loss", "of the stage", {"loss": "loss"}),
    ("KL", "to the frozen reference, nats a token", {"kl": "KL"}),
    ("Entropy", "of the policy, nats a token", {"entropy": "entropy"}),
    ("Completion length", "tokens", {"completion_length": "tokens"}),
    ("Truncated", "fraction of completions without an end", {"truncated_fraction": "truncated"}),
    ("Rollout gap", "between log p when sampled and scored", {"rollout_gap": "gap"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Learning rate", "of each update", {"learning_rate": "learning rate"}),
    ("Speed", "tokens a second", {"tokens_per_second": "tokens/s"}),
    ("Seconds", "a step", {"rollout_seconds": "rollout", "update_seconds": "update"}),
)
EXACT = {"learning_rate"}  # what is set, not measured: no mean is taken of it
WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24  # margins of a chart's plot
PLOT = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
POINTS = 300  # a line is averaged down to at most about so many
SMOOTHING = 0.9  # of the exponential mean drawn over the raw line

# (step, value) of each stage; None where a step has none.
Series = Sequence[Sequence[tuple[float, float | None]]]


@dataclasses.dataclass(frozen=True)
class Line:
    label: str
    raw: str  # SVG path
    last: str  # the last step's value
    smooth: str | None = None  # path of the exponential mean
    smoothed: str | None = None  # where it ends


@dataclasses.dataclass(frozen=True)
class Chart:
    title: str
    meaning: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]  # position, label
    y_ticks: list[tuple[float, str]]
    border: float | None  # where stage 2 begins


def write(run_dir: str | os.PathLike[str]) -> Path:
    """Writes RUN_DIR/report.html from metrics.jsonl, evaluation.json, config.yaml and samples/;
    what is missing is left out. Returns the file."""
    run_dir = Path(run_dir)
    rows = metrics.read(run_dir)
    evaluation = metrics.read_scores(run_dir / "evaluation.json")
    config = run_dir / "config.yaml"
    page = render(
        "report.html",
        name=run_dir.resolve().name,
        headline=headline(evaluation),
        stages=[
            (title, sum(row["stage"] == stage for row in rows))
            for stage, title in metrics.STAGE_TITLES.items()
        ],
        columns=[title for key, title in EVALUATIONS.items() if key in evaluation],
        table=table(evaluation),
        charts=charts(rows),
        samples=[_sample(file) for file in sorted((run_dir / "samples").glob("*.png"))],
        config=config.read_text() if config.is_file() else "",
        hardware=hardware(),
        size=(WIDTH, HEIGHT),
        points=POINTS,
        plot=PLOT,
    )
    return files.write_text(run_dir / "report.html", page)


def render(template: str, **values: Any) -> str:
    """A page from a template beside this module."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lens_jax.reports", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def headline(evaluation: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(score, first, last) of what the run is about, where both were measured."""
    measured = [evaluation[key] for key in EVALUATIONS if key in evaluation]
    if len(measured) < 2:
        return []
    return [
        (label, measured[0][key], measured[-1][key])
        for key, label in (("box_iou", "box IoU"), ("giou", "gIoU"))
        if measured[0].get(key) is not None and measured[-1].get(key) is not None
    ]


def table(evaluation: dict[str, Any]) -> list[tuple[Score, list[str], str, bool]]:
    """Rows of the before/after table: score, cells, change, whether that is progress."""
    measured = [evaluation[key] for key in EVALUATIONS if key in evaluation]
    rows = []
    for key, score in SCORES.items():
        values = [scores.get(key) for scores in measured]
        if all(value is None for value in values):
            continue
        digits = 3 if score.is_fraction else 0
        cells = ["–" if v is None else f"{v:,.{digits}f}" for v in values]
        change, rises = "", False
        if score.is_fraction and len(values) > 1 and None not in (values[0], values[-1]):
            change, rises = f"{values[-1] - values[0]:+.3f}", values[-1] > values[0]
        rows.append((score, cells, change, rises))
    return rows


def charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """One chart for each entry of CHARTS that has values, over the steps of both stages."""
    stages = [[row for row in rows if row["stage"] == stage] for stage in metrics.STAGES]
    border = max((row["step"] for row in stages[0]), default=0)
    drawn = []
    for title, meaning, keys in CHARTS:
        series = {
            label: [
                [(row["step"] + offset, row.get(key)) for row in part]
                for part, offset in zip(stages, (0, border), strict=True)
            ]
            for key, label in expand(keys, rows).items()
        }
        drawn.append(chart(title, meaning, series, border, exact=bool(EXACT & keys.keys())))
    return [one for one in drawn if one is not None]


def expand(keys: dict[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Keys with labels, and in the place of `reward/` every channel that `rows` have."""
    channels = sorted({key for row in rows for key in row if key.startswith("reward/")})
    named: dict[str, str] = {}
    for key, label in keys.items():
        named |= {c: c.removeprefix(key) for c in channels} if key == "reward/" else {key: label}
    return named


def hardware() -> list[tuple[str, str]]:
    """What the page was made on, which is where the run's last process ran."""
    kinds = [d.device_kind for d in jax.devices()]
    devices = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    return [
        ("devices", f"{devices} ({jax.default_backend()})"),
        ("processes", str(jax.process_count())),
        ("host", f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}"),
        ("software", f"jax {jax.__version__}, Python {platform.python_version()}"),
    ]


def _thin(parts: Series, exact: bool) -> list[list[tuple[float, float]]]:
    """Of each stage that has any, its values, so that there are about POINTS in all: means over
    consecutive steps, or, of what is exact, one of them and always the last."""
    known = [[(x, y) for x, y in part if y is not None] for part in parts]
    size = math.ceil(sum(map(len, known)) / POINTS) or 1

    def mean(group: list[tuple[float, float]]) -> tuple[float, float]:
        if exact:
            return group[-1]
        return sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)

    return [[mean(part[i : i + size]) for i in range(0, len(part), size)] for part in known if part]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean without the bias of its start."""
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        total = SMOOTHING * total + y
        weight = SMOOTHING * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def chart(
    title: str, meaning: str, series: dict[str, Series], border: int, *, exact: bool = False
) -> Chart | None:
    """Lines over steps, where `border` is the first stage's last one; None without any value.

    Args:
        exact: of values that are no measurement no mean is taken.
    """
    drawn = {label: thin for label, parts in series.items() if (thin := _thin(parts, exact))}
    if not drawn:
        return None
    points = [point for parts in drawn.values() for part in parts for point in part]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = min(*ys, *y_ticks), max(*ys, *y_ticks)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM),
        )

    def path(stages: list[list[tuple[float, float]]]) -> str:
        return "".join(
            "M" + "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in points)
            for points in stages
        )

    lines = []
    for label, parts in drawn.items():
        last = [part for part in series[label] if any(y is not None for _, y in part)][-1][-1][1]
        smooth = [] if exact else [_smooth(part) for part in parts]
        lines.append(
            Line(
                label,
                path(parts),
                "–" if last is None else _short(last),
                path(smooth) if smooth else None,
                _short(smooth[-1][-1][1]) if smooth else None,
            )
        )
    return Chart(
        title,
        meaning,
        lines,
        [(at(x, y0)[0], _short(x)) for x in x_ticks],
        [(at(x0, y)[1], _short(y)) for y in y_ticks],
        at(border + 0.5, y0)[0] if x0 <= border < x1 else None,
    )


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose or fill [low, high]."""
    if high <= low:
        room = abs(low) / 10 or 1.0
        low, high = (low - room if low else 0.0), high + room
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [i * step for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def _short(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _sample(file: Path) -> dict[str, Any]:
    """A sample's text, and its panels as data URIs."""
    info = drawing.read_info(file)
    panels = []
    with Image.open(file) as picture:
        for panel in info["panels"]:
            x, y, w, h = panel["at"]
            uri = drawing.data_uri(picture.crop((x, y, x + w, y + h)))
            panels.append(panel | {"uri": uri, "scores": drawing.scores(panel), "size": (w, h)})
    return {"expression": info["expression"], "panels": panels}
