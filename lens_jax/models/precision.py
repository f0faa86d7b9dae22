"""The two precisions of a model's matrix products."""

from contextlib import AbstractContextManager
from typing import Literal

import jax
import jax.numpy as jnp

Precision = Literal["float32", "bfloat16"]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def default() -> Precision:
    """The default of inference: float32 on CPU, bfloat16 on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def products(precision: Precision) -> AbstractContextManager:
    """Context in which a model's programs are traced.

    Left alone, GPUs and TPUs multiply float32 numbers in TF32 or bfloat16. The setting is that of
    one thread: programs must be called inside of it, too.
    """
    return jax.default_matmul_precision("highest" if precision == "float32" else "default")
