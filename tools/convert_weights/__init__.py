"""Official PyTorch weights to checkpoints of lens-jax, and back: `-m tools.convert_weights --help`.

The code is `lens_jax.convert_weights`, where a wheel holds it.
"""
