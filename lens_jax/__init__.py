"""LENS in JAX: segment whatever a sentence describes."""

from importlib import import_module

__all__ = ["Lens"]


def __getattr__(name: str):
    # Imported when asked for: `import lens_jax` costs nothing.
    if name == "Lens":
        return import_module("lens_jax.inference").Lens
    raise AttributeError(f"module 'lens_jax' has no attribute {name!r}")
