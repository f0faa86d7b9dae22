"""Checks, casts and compares values, a piece at a time: a tensor may be a gigabyte."""

import math
from collections.abc import Iterator
from typing import Literal

import jax
import ml_dtypes
import numpy as np

Dtype = Literal["keep", "float32", "bfloat16"]

_PIECE_BYTES = 16 * 2**20


def pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous copies (views where they are contiguous already) of consecutive rows of `x`."""
    if x.ndim == 0:
        x = x[None]
    step = max(1, _PIECE_BYTES // max(1, math.prod(x.shape[1:]) * x.dtype.itemsize))
    for start in range(0, len(x), step):
        yield np.ascontiguousarray(x[start : start + step])


def bits(x: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def is_floating(dtype: np.dtype) -> bool:
    return jax.dtypes.issubdtype(dtype, np.floating)


def is_finite(x: np.ndarray) -> bool:
    """Whether a tensor is free of NaN and infinity; one of integers always is."""
    if not is_floating(x.dtype):
        return True
    exponent = bits(np.array(np.inf, x.dtype))
    return not any(((bits(piece) & exponent) == exponent).any() for piece in pieces(x))


def cast(x: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Floating-point tensors as `dtype`; `keep` changes no bit."""
    if dtype == "keep" or not is_floating(x.dtype):
        return x
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32, copy=False)


def difference(ours: np.ndarray, theirs: np.ndarray) -> str | None:
    """In what two tensors differ, bit by bit, in words."""
    if ours.shape != theirs.shape:
        return f"has shape {list(ours.shape)} here, {list(theirs.shape)} there"
    if ours.dtype != theirs.dtype:
        return f"is {ours.dtype} here, {theirs.dtype} there"
    count, largest = 0, 0.0
    for a, b in zip(pieces(ours), pieces(theirs), strict=True):
        unlike = bits(a) != bits(b)
        if unlike.any():
            count += int(unlike.sum())
            gap = a[unlike].astype(np.float64) - b[unlike].astype(np.float64)
            largest = max(largest, float(np.abs(gap).max()))
    return f"differs in {count} of {ours.size} values, by up to {largest:.3g}" if count else None
