"""Programs on many devices are compiled, not optimised: XLA's time is most of these tests'."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
