"""LENS and its parts. Modules take `rngs`, and `dtype`, the type of their products, as options."""
