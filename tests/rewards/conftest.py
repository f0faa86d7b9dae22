from pathlib import Path

import jax
import pytest
from transformers import AutoTokenizer

from lens_jax.rewards import text_rewards

GOLDEN = Path(__file__).parents[1] / "golden" / "data"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "lens_tiny")


@pytest.fixture(scope="session")
def score(tokenizer):
    return jax.jit(text_rewards(tokenizer))
