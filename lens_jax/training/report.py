"""report.html: one self-contained page about a run, from the files in its directory alone."""

import base64
import dataclasses
import io
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import yaml
from PIL import Image

from lens_jax import files
from lens_jax.training import drawing, metrics

# Evaluations in the order they happen, with their headings.
EVALUATIONS = {
    "before": "before",
    "after_alignment": "after alignment",
    "after_grpo": "after GRPO",
}
# Keys of evaluation.json -> label, and whether the value is a fraction whose rise is progress.
SCORES = {
    "box_iou": ("box IoU", True),
    "giou": ("gIoU", True),
    "ciou": ("cIoU", True),
    "precision_at_0.5": ("mask IoU > 0.5", True),
    "format_rate": ("in format", True),
    "samples": ("expressions", False),
    "seconds": ("seconds", False),
}
# Title, what it means, keys of metrics.jsonl -> label; `reward/` stands for all channels.
CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Reward",
        "weighted sum and channels, mean over completions",
        {"reward": "total", "reward/": ""},
    ),
    ("IoU", "training batches", {"box_iou": "box", "mask_iou": "mask"}),
    ("Loss", "of the stage", {"loss": "loss"}),
    ("KL", "k3 to the frozen reference, nats a token", {"kl": "KL"}),
    ("Entropy", "of the policy, nats a token", {"entropy": "entropy"}),
    ("Completion length", "tokens", {"completion_length": "tokens"}),
    ("Truncated", "fraction of completions without an end", {"truncated_fraction": "truncated"}),
    ("Rollout gap", "sampling against scoring log-probs", {"rollout_gap": "gap"}),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Speed", "tokens a second", {"tokens_per_second": "tokens/s"}),
    ("Seconds", "a step", {"rollout_seconds": "rollout", "update_seconds": "update"}),
)
WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24  # margins of a chart's plot
POINTS = 300  # a line is averaged down to at most so many
SMOOTHING = 0.9  # of the exponential mean drawn over the raw line


@dataclasses.dataclass(frozen=True)
class Line:
    label: str
    raw: str  # SVG path
    smooth: str
    last: str


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
        stages=[(s, sum(r["stage"] == s for r in rows)) for s in metrics.STAGES],
        columns=[title for key, title in EVALUATIONS.items() if key in evaluation],
        table=table(evaluation),
        charts=charts(rows),
        samples=[_sample(file) for file in sorted((run_dir / "samples").glob("*.png"))],
        config=config.read_text() if config.is_file() else "",
        hardware=hardware(),
        size=(WIDTH, HEIGHT),
        plot=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    )
    return files.write_text(run_dir / "report.html", page)


def compare(run_dirs: Sequence[str | os.PathLike[str]], file: str | os.PathLike[str]) -> Path:
    """Writes one page over several runs: a chart for each number of each stage with a line for each
    run, the last scores, and the keys in which configurations differ. Returns the file."""
    directories = [Path(run) for run in run_dirs]
    names = [str(run) for run in directories]
    rows = dict(zip(names, map(metrics.read, directories), strict=True))
    measured = []
    for run in directories:
        evaluation = metrics.read_scores(run / "evaluation.json")
        measured.append(next((evaluation[k] for k in reversed(EVALUATIONS) if k in evaluation), {}))
    scores = [
        (label, ["–" if m.get(key) is None else f"{m[key]:.3f}" for m in measured])
        for key, (label, is_fraction) in SCORES.items()
        if is_fraction and any(m.get(key) is not None for m in measured)
    ]
    page = render(
        "compare.html",
        runs=names,
        scores=scores,
        differences=_differences(directories),
        stages=[(stage, _overlaid(rows, stage)) for stage in metrics.STAGES],
        size=(WIDTH, HEIGHT),
        plot=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    )
    return files.write_text(Path(file), page)


def _overlaid(runs: dict[str, list[dict[str, Any]]], stage: str) -> list[Chart]:
    """A chart for each number that CHARTS names, with a line for each run that has it."""
    rows = {name: [r for r in part if r["stage"] == stage] for name, part in runs.items()}
    channels = sorted({k for part in rows.values() for r in part for k in r if "reward/" in k})
    drawn = []
    for title, meaning, keys in CHARTS:
        for key in [c for k in keys for c in (channels if k == "reward/" else [k])]:
            series = {
                name: [(r["step"], r[key]) for r in part if r.get(key) is not None]
                for name, part in rows.items()
            }
            series = {name: _thin(points) for name, points in series.items() if points}
            if series:
                label = title if len(keys) == 1 else f"{title}: {key}"
                drawn.append(_chart(label, meaning if len(keys) == 1 else "", series, 0))
    return drawn


def _differences(directories: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Keys that are not the same in all configurations, with their values."""
    flat = []
    for run in directories:
        file = run / "config.yaml"
        try:
            flat.append(_flat(yaml.safe_load(file.read_bytes())) if file.is_file() else {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise metrics.RunError(f"{file} cannot be read: {reason}") from error
    keys = dict.fromkeys(key for values in flat for key in values)
    table = [(key, [str(values.get(key, "–")) for values in flat]) for key in keys]
    return [(key, values) for key, values in table if len(set(values)) > 1]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {k: v for key, part in tree.items() for k, v in _flat(part, f"{prefix}{key}.").items()}


def render(template: str, **values: Any) -> str:
    """A page from a template beside this module."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lens_jax.training", "."),
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


def table(evaluation: dict[str, Any]) -> list[tuple[str, list[str], str, bool]]:
    """Rows of the before/after table: label, cells, change, whether that is progress."""
    measured = [evaluation[key] for key in EVALUATIONS if key in evaluation]
    rows = []
    for key, (label, is_fraction) in SCORES.items():
        values = [scores.get(key) for scores in measured]
        if all(value is None for value in values):
            continue
        digits = 3 if is_fraction else 0
        cells = ["–" if v is None else f"{v:,.{digits}f}" for v in values]
        change, rises = "", False
        if is_fraction and len(values) > 1 and None not in (values[0], values[-1]):
            change, rises = f"{values[-1] - values[0]:+.3f}", values[-1] > values[0]
        rows.append((label, cells, change, rises))
    return rows


def charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """One chart for each entry of CHARTS that has values, over the steps of both stages."""
    first_stage = [r["step"] for r in rows if r["stage"] == metrics.STAGES[0]]
    offset = max(first_stage, default=0)
    steps = [r["step"] + (offset if r["stage"] == metrics.STAGES[1] else 0) for r in rows]
    channels = sorted({k for r in rows for k in r if k.startswith("reward/")})
    drawn = []
    for title, meaning, keys in CHARTS:
        named = {
            key: label
            for k, l in keys.items()
            for key, label in (
                [(c, c.removeprefix("reward/")) for c in channels] if k == "reward/" else [(k, l)]
            )
        }
        series = {
            label: [(s, r[k]) for s, r in zip(steps, rows, strict=True) if r.get(k) is not None]
            for k, label in named.items()
        }
        series = {label: _thin(points) for label, points in series.items() if points}
        if series:
            drawn.append(_chart(title, meaning, series, offset))
    return drawn


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


def _thin(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means over consecutive points, so that there are at most POINTS."""
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean without the bias of its start."""
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        total = SMOOTHING * total + y
        weight = SMOOTHING * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _chart(
    title: str, meaning: str, series: dict[str, list[tuple[float, float]]], offset: int
) -> Chart:
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
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
    for label, points in series.items():
        stages = [[p for p in points if p[0] <= offset], [p for p in points if p[0] > offset]]
        stages = [points for points in stages if points]
        smooth = [_smooth(points) for points in stages]
        lines.append(Line(label, path(stages), path(smooth), _short(smooth[-1][-1][1])))
    return Chart(
        title,
        meaning,
        lines,
        [(at(x, y0)[0], _short(x)) for x in x_ticks],
        [(at(x0, y)[1], _short(y)) for y in y_ticks],
        at(offset + 0.5, y0)[0] if x0 <= offset < x1 else None,
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
            uri = data_uri(picture.crop((x, y, x + w, y + h)))
            panels.append(panel | {"uri": uri, "scores": drawing.scores(panel), "size": (w, h)})
    return {"expression": info["expression"], "panels": panels}


def data_uri(picture: Image.Image) -> str:
    """A picture as a JPEG inside the page."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
