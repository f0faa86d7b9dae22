"""Boxes xyxy on the host: the one around a mask, and how far two overlap."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float


def mask_box(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "4"]:
    """The box around the pixels that are set, of which there must be one; ends are exclusive."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], np.float64)


def touch(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two boxes share an area."""
    return bool((np.minimum(a, b)[2:] > np.maximum(a, b)[:2]).all())


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """IoU of two boxes; 0 where their union has no area or is infinite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    return float(inner / union) if union > 0 and np.isfinite(union) else 0.0
