"""Charts of a run's metrics over its steps: which ones, and the SVG paths for chart.html."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from lens_jax.training import metrics

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
EXACT = {"learning_rate"}  # keys that are set, not measured: they are never averaged
WIDTH, HEIGHT = 440, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24  # margins of a chart's plot
POINTS = 300  # a line is averaged down to about this many points
SMOOTHING = 0.9  # decay of the exponential mean that is drawn over the raw line
# What chart.html and the pages around it need besides the charts.
LAYOUT = {
    "size": (WIDTH, HEIGHT),
    "plot": (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
    "points": POINTS,
}

Points = list[tuple[float, float]]
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


def both_stages(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """A chart for each entry of CHARTS that has values, over the steps of both stages."""
    stages = [[row for row in rows if row["stage"] == stage] for stage in metrics.STAGES]
    border = max((row["step"] for row in stages[0]), default=0)
    drawn = []
    for title, meaning, keys in CHARTS:
        series = {
            label: [
                [(row["step"] + offset, row.get(key)) for row in part]
                for part, offset in zip(stages, (0, border), strict=True)
            ]
            for key, label in _expand(keys, rows).items()
        }
        drawn.append(chart(title, meaning, series, border, exact=bool(EXACT & keys.keys())))
    return [one for one in drawn if one is not None]


def one_stage(runs: dict[str, Sequence[dict[str, Any]]], stage: str) -> list[Chart]:
    """A chart for each number of a stage, with a line for each run (name -> its rows)."""
    runs = {name: [row for row in rows if row["stage"] == stage] for name, rows in runs.items()}
    drawn = []
    for title, meaning, keys in CHARTS:
        for key, label in _expand(keys, [row for rows in runs.values() for row in rows]).items():
            series = {
                name: [[(row["step"], row.get(key)) for row in rows]] for name, rows in runs.items()
            }
            heading = title if len(keys) == 1 else f"{title}: {label}"
            drawn.append(chart(heading, meaning, series, 0, exact=key in EXACT))
    return [one for one in drawn if one is not None]


def chart(
    title: str, meaning: str, series: dict[str, Series], border: int, *, exact: bool = False
) -> Chart | None:
    """Lines over steps, where `border` is the first stage's last one; None without any value.

    Args:
        exact: draw the values themselves, without any mean.
    """
    drawn = {label: thin for label, parts in series.items() if (thin := _thin(parts, exact))}
    if not drawn:
        return None
    xs, ys = zip(*(point for parts in drawn.values() for p in parts for point in p), strict=True)
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = min(*ys, *y_ticks), max(*ys, *y_ticks)

    def right(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    def path(parts: list[Points]) -> str:
        return "".join(
            "M" + "L".join(f"{right(x):.1f} {down(y):.1f}" for x, y in part) for part in parts
        )

    lines = []
    for label, parts in drawn.items():
        last = [part for part in series[label] if any(y is not None for _, y in part)][-1][-1][1]
        line = Line(label, path(parts), "–" if last is None else _short(last))
        if not exact:
            smooth = [_smooth(part) for part in parts]
            end = _short(smooth[-1][-1][1])
            line = dataclasses.replace(line, smooth=path(smooth), smoothed=end)
        lines.append(line)
    return Chart(
        title,
        meaning,
        lines,
        [(right(x), _short(x)) for x in x_ticks],
        [(down(y), _short(y)) for y in y_ticks],
        right(border + 0.5) if x0 <= border < x1 else None,
    )


def _expand(keys: dict[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Keys with labels, and in the place of `reward/` every channel that `rows` have."""
    channels = sorted({key for row in rows for key in row if key.startswith("reward/")})
    named: dict[str, str] = {}
    for key, label in keys.items():
        named |= {c: c.removeprefix(key) for c in channels} if key == "reward/" else {key: label}
    return named


def _thin(parts: Series, exact: bool) -> list[Points]:
    """The values of each stage that has any, about POINTS in all: means over consecutive steps, or
    for exact values one of them, the last one always included."""
    known = [[(x, y) for x, y in part if y is not None] for part in parts]
    size = math.ceil(sum(map(len, known)) / POINTS) or 1

    def mean(group: Points) -> tuple[float, float]:
        if exact:
            return group[-1]
        return sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)

    return [[mean(part[i : i + size]) for i in range(0, len(part), size)] for part in known if part]


def _smooth(points: Points) -> Points:
    """An exponential mean without the bias of its start."""
    total, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        total = SMOOTHING * total + y
        weight = SMOOTHING * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose or fill [low, high]."""
    if high <= low:
        room = abs(low) / 10 or 1.0
        low, high = (low - room if low else 0.0), high + room
    return MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high).tolist()


def _short(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
