"""The form of a COCO file's boxes, told by masks, areas and image sizes: tools differ in it."""

import collections
from collections.abc import Sequence
from typing import Any, Literal

from lens_jax.data.sources.annotations import numbers
from lens_jax.preparation.conversion.objects import Unfit, bounds, polygons

ASKED = 1000  # of a file's boxes that tell their form
AGREED = 0.9  # share of them that must tell the same
CLOSE = 0.02  # by which an area may differ from its box's, as a part of it
Form = Literal["auto", "xywh", "xyxy"]


def form_of_boxes(annotations: Sequence[dict[str, Any]], size_of: Any) -> Form:
    """The form of a file's boxes, told by its masks, areas and images; auto if they do not tell."""
    votes: collections.Counter[str] = collections.Counter()
    for annotation in annotations:
        try:
            x, y, third, fourth = numbers(annotation.get("bbox"), 4, "bbox")
            vote = _vote((x, y, third, fourth), annotation, size_of(annotation))
        except (Unfit, ValueError, TypeError, AttributeError):
            continue
        if vote is not None:
            votes[vote] += 1
        if votes.total() == ASKED:
            break
    for form in ("xywh", "xyxy"):
        if votes[form] and votes[form] >= AGREED * votes.total():
            return form
    return "auto"


def _vote(
    box: tuple[float, float, float, float],
    annotation: dict[str, Any],
    size: tuple[int, int] | None,
) -> Form | None:
    x, y, third, fourth = box
    if max(box) <= 1.01:
        return None
    if third <= x or fourth <= y:
        return "xywh" if third > 0 and fourth > 0 else None
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation and not isinstance(segmentation[0], dict):
        *_, x1, y1 = bounds(polygons(segmentation)[0])
        if max(x1, y1) <= 1.01:
            return None
        as_size = abs(x1 - x - third) + abs(y1 - y - fourth)
        as_corner = abs(x1 - third) + abs(y1 - fourth)
        return "xywh" if as_size < as_corner else "xyxy" if as_corner < as_size else None
    area = annotation.get("area")
    if type(area) in (int, float) and area > 0:
        as_corners, inclusive = (third - x) * (fourth - y), (third - x + 1) * (fourth - y + 1)
        if third * fourth > inclusive * (1 + 2 * CLOSE):
            # A mask's area is its box's at most.
            if area > inclusive * (1 + CLOSE):
                return "xywh"
            if not segmentation and area > as_corners * (1 - CLOSE):
                return "xyxy"
    if size is not None and (x + third > size[1] + 1 or y + fourth > size[0] + 1):
        return "xyxy"
    return None
