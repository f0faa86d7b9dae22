"""The command line: `python -m tools.convert_weights COMMAND --help`."""

from lens_jax.convert_weights.__main__ import process

if __name__ == "__main__":
    process()
