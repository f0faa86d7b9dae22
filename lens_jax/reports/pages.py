"""Shared by the pages: templates, images inside a page, and how scores are shown."""

import base64
import functools
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
from PIL import Image


class ShownScore(NamedTuple):
    """How a key of evaluation.json is shown."""

    label: str
    meaning: str
    is_fraction: bool = True  # a rise is progress


SCORES = {
    "box_iou": ShownScore("box IoU", "IoU of the written and the true box, mean over samples"),
    "giou": ShownScore("gIoU", "IoU of the two masks, mean over samples"),
    "ciou": ShownScore("cIoU", "all intersections of masks over all unions"),
    "precision_at_0.5": ShownScore("precision_at_0.5", "samples with a mask IoU above 0.5"),
    "format_rate": ShownScore("format_rate", "completions of the form that the prompt asks for"),
    "samples": ShownScore("samples", "a picture with one expression each", False),
    "seconds": ShownScore("seconds", "of decoding and scoring", False),
}


def show(key: str, scores: Mapping[str, Any]) -> str:
    """A score as tables show it, a dash without one."""
    value = scores.get(key)
    if value is None:
        return "–"
    return f"{value:.3f}" if SCORES[key].is_fraction else f"{value:,.0f}"


def render(template: str, **values: Any) -> str:
    """A self-contained page from a template below lens_jax/, such as reports/report.html."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lens_jax", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def data_uri(image: Image.Image) -> str:
    """An image as a JPEG inside a page."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
