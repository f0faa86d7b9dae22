import sys

from lens_jax import interrupts

if sys.argv[0] == "-m":  # python -m tools.x: what follows are its imports, which take a while
    interrupts.quit_at_once()

from lens_jax import interpreter  # noqa: F401
