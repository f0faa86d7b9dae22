from lens_jax import interpreter  # noqa: F401
