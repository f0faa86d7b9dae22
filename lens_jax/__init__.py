"""LENS in JAX: segment whatever a sentence describes."""

import os
from importlib import import_module

# Tokenizers are all that is used of transformers: it need not advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["Lens"]


def __getattr__(name: str):
    # Imported when asked for: `import lens_jax` costs nothing.
    if name == "Lens":
        return import_module("lens_jax.inference").Lens
    raise AttributeError(f"module 'lens_jax' has no attribute {name!r}")
