"""Drawings of a model's answers: target and prediction on the image, stage beside stage.

A sample is one PNG, to which every evaluation adds a panel. Its text and geometry also lie in the
file, as JSON under the PNG text key `lens`, so that report.py can show it without other files.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import matplotlib.font_manager
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lens_jax import files

PANEL = 400  # pixels of a panel's longer side; small images are enlarged to it
PAD = 14
INK, FAINT, PAPER = (28, 30, 36), (108, 113, 124), (255, 255, 255)
PREDICTED = (0, 214, 255)  # a colour that none of the generated shapes has
TRUE, HALO = (255, 255, 255), (20, 20, 24)
TITLE, BODY = 19, 16  # font sizes
COMPLETION_LINES = 4
LEGEND = "light blue: answer · white: truth"
KEY = "lens"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer at one point of the run; boxes are xyxy pixels of the image."""

    title: str
    completion: str
    box: Float[np.ndarray, "4"] | None
    mask: Bool[np.ndarray, "H W"]
    box_iou: float | None
    mask_iou: float


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    answer_box: Float[np.ndarray, "4"] | None,
    answer_mask: Bool[np.ndarray, "H W"],
    true_box: Float[np.ndarray, "4"] | None = None,
    true_mask: Bool[np.ndarray, "H W"] | None = None,
    *,
    side: int = PANEL,
) -> Image.Image:
    """The image, its longer side `side` pixels: predicted mask tinted and outlined with its box in
    one colour, the target as a thin and a dashed white line.

    Every line has a dark one beside it: one of the two is seen on any colour. Lines grow with the
    square root of `side`, so that they are seen on a large image that is shown small.
    """
    h, w = image.shape[:2]
    scale = side / max(h, w)
    size = (max(1, round(w * scale)), max(1, round(h * scale)))
    line = max(1, round(math.sqrt(side / PANEL)))
    canvas = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    mask = _resize(answer_mask, size)
    canvas[mask] = (canvas[mask] + np.array(PREDICTED, np.uint16)) // 2
    canvas[_edge(~mask, 2 * line)] = HALO
    canvas[_edge(mask, 3 * line)] = PREDICTED
    if true_mask is not None:
        target = _resize(true_mask, size)
        canvas[_edge(target, 4 * line)] = HALO
        canvas[_edge(target, 2 * line)] = TRUE
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if _is_box(answer_box):
        x0, y0, x1, y1 = _on_canvas(answer_box, scale, size)
        outer = (x0 - line, y0 - line, x1 + line, y1 + line)
        draw.rectangle(outer, outline=HALO, width=5 * line)
        draw.rectangle((x0, y0, x1, y1), outline=PREDICTED, width=3 * line)
    if true_box is not None:
        _dashed(draw, _on_canvas(true_box, scale, size), line)
    return picture


def add_panel(
    file: str | os.PathLike[str],
    image: UInt8[np.ndarray, "H W 3"],
    expression: str,
    true_box: Float[np.ndarray, "4"] | None,
    true_mask: Bool[np.ndarray, "H W"],
    answer: Answer,
) -> None:
    """Draws `answer` to the right of the panels that `file` holds, or in place of the one with the
    same title; a file that does not exist is begun."""
    file = Path(file)
    pictures: list[tuple[dict[str, Any], Image.Image]] = []
    if file.exists():
        with Image.open(file) as old:
            old.load()
            for panel in read_info(file)["panels"]:
                x, y, w, h = panel["at"]
                pictures.append((panel, old.crop((x, y, x + w, y + h))))
    new = {
        "title": answer.title,
        "completion": answer.completion,
        "box": [float(v) for v in answer.box] if _is_box(answer.box) else None,
        "box_iou": answer.box_iou,
        "mask_iou": answer.mask_iou,
    }
    drawn = (new, overlay(image, answer.box, answer.mask, true_box, true_mask))
    same = [i for i, (panel, _) in enumerate(pictures) if panel["title"] == answer.title]
    if same:
        pictures[same[0]] = drawn
    else:
        pictures.append(drawn)
    _compose(expression, pictures, file)


def read_info(file: str | os.PathLike[str]) -> dict[str, Any]:
    """`{"expression", "panels": [{"title", "completion", "box", "box_iou", "mask_iou",
    "at": [x, y, w, h]}]}` of a sample's PNG."""
    with Image.open(file) as picture:
        picture.load()
        text = getattr(picture, "text", {}).get(KEY)
    if text is None:
        raise ValueError(f"{file} was not drawn by lens_jax")
    return json.loads(text)


def scores(panel: Mapping[str, Any]) -> str:
    """A panel's IoUs in words."""
    mask = f"mask IoU {panel['mask_iou']:.2f}"
    if panel["box"] is None:
        return f"no box · {mask}"
    return mask if panel["box_iou"] is None else f"box IoU {panel['box_iou']:.2f} · {mask}"


def _compose(
    expression: str, pictures: list[tuple[dict[str, Any], Image.Image]], file: Path
) -> None:
    widths = [max(picture.width, PANEL * 3 // 4) for _, picture in pictures]
    width = PAD + sum(w + PAD for w in widths)
    heading = _wrap(f"“{expression}”", _font(TITLE, bold=True), width - 2 * PAD, 3)
    top = PAD + len(heading) * (TITLE + 7) + BODY + 16
    below = top + max(picture.height for _, picture in pictures) + 8
    captions = [
        _wrap(panel["completion"], _font(BODY), w, COMPLETION_LINES)
        for (panel, _), w in zip(pictures, widths, strict=True)
    ]
    height = below + (max(map(len, captions)) + 1) * (BODY + 6) + PAD
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        draw.text((PAD, PAD + i * (TITLE + 7)), line, INK, _font(TITLE, bold=True))
    room = width - 2 * PAD - _font(BODY).getlength(LEGEND)
    if _font(TITLE, bold=True).getlength(heading[0]) + 2 * PAD < room:
        draw.text((PAD + room, PAD + TITLE - BODY), LEGEND, FAINT, _font(BODY))
    panels = []
    x = PAD
    for (panel, picture), w, caption in zip(pictures, widths, captions, strict=True):
        draw.text((x, top - BODY - 8), panel["title"], FAINT, _font(BODY, bold=True))
        sheet.paste(picture, (x, top))
        draw.text((x, below), scores(panel), FAINT, _font(BODY, bold=True))
        for i, line in enumerate(caption, start=1):
            draw.text((x, below + i * (BODY + 6)), line, INK, _font(BODY))
        panels.append(panel | {"at": [x, top, *picture.size]})
        x += w + PAD
    info = PngInfo()
    text = json.dumps({"expression": expression, "panels": panels}, ensure_ascii=False)
    info.add_itxt(KEY, text)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(file) as unfinished:
        sheet.save(unfinished, format="PNG", pnginfo=info, optimize=True)


def _resize(mask: Bool[np.ndarray, "H W"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Larger smoothly: staircases of single pixels become slopes. Smaller so that none is lost."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    if size[0] < mask.shape[1]:
        return np.asarray(grey.resize(size, Image.Resampling.BOX)) > 0
    return np.asarray(grey.resize(size, Image.Resampling.BICUBIC)) > 127


def _edge(mask: Bool[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """The outermost `width` pixels of a mask; the image's border is no edge."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(
        mask.astype(np.uint8), cross, iterations=width, borderType=cv2.BORDER_REPLICATE
    )
    return mask & (inner == 0)


def _is_box(box: Float[np.ndarray, "4"] | None) -> bool:
    return box is not None and bool(np.isfinite(box).all())


def _on_canvas(
    box: Float[np.ndarray, "4"], scale: float, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Corners in canvas pixels, in order and just inside: a model may write any numbers."""
    x0, x1 = sorted(float(v) for v in np.clip(np.asarray(box)[[0, 2]] * scale, 2, size[0] - 3))
    y0, y1 = sorted(float(v) for v in np.clip(np.asarray(box)[[1, 3]] * scale, 2, size[1] - 3))
    return round(x0), round(y0), round(x1), round(y1)


def _dashed(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], line: int) -> None:
    x0, y0, x1, y1 = box
    dash = 9 * line
    for color, width in ((HALO, 4 * line), (TRUE, 2 * line)):
        for x in range(x0, x1, 2 * dash):
            for y in (y0, y1):
                draw.line((x, y, min(x + dash, x1), y), fill=color, width=width)
        for y in range(y0, y1, 2 * dash):
            for x in (x0, x1):
                draw.line((x, y, x, min(y + dash, y1)), fill=color, width=width)


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings along: PIL's own font lacks most of Unicode."""
    weight = "bold" if bold else "normal"
    properties = matplotlib.font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(matplotlib.font_manager.findfont(properties), size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; words longer than a line are broken."""
    wrapped = [""]
    for word in text.split():
        candidate = f"{wrapped[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            wrapped[-1] = candidate
            continue
        if wrapped[-1]:
            wrapped.append("")
        for part in re.findall(r"\d{1,9}|\D", word):  # a number is not broken
            if font.getlength(wrapped[-1] + part) > width:
                wrapped.append("")
            wrapped[-1] += part
        if len(wrapped) > lines:
            break
    if len(wrapped) > lines:
        wrapped = wrapped[:lines]
        while wrapped[-1] and font.getlength(wrapped[-1] + "…") > width:
            wrapped[-1] = wrapped[-1][:-1]
        wrapped[-1] += "…"
    return wrapped
