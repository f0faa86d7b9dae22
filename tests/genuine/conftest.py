"""Genuine directories and what conversion makes of them, each made once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lens_jax.convert_weights import from_torch
from tests.genuine import build

QUERIES = 5
SAM = "sam2.transformers_4.57.1"


@pytest.fixture(scope="session")
def genuine(tmp_path_factory) -> Callable[[str], Path]:
    """An artefact's name -> its directory; the released ones in shards of bfloat16."""
    root, made = tmp_path_factory.mktemp("genuine"), {}

    def get(name: str) -> Path:
        if name not in made:
            import ml_dtypes

            released = name.endswith(".released")
            made[name] = build.write(
                name,
                root / name,
                shards=2 if released else 1,
                dtype=ml_dtypes.bfloat16 if released else np.float32,
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def converted(genuine, tmp_path_factory) -> Callable[..., Path]:
    """Names of a language model and of SAM -> the checkpoint of ours, float32."""
    root, made = tmp_path_factory.mktemp("converted"), {}

    def get(mllm: str, sam: str = SAM) -> Path:
        key = f"{mllm}+{sam}"
        if key not in made:
            from_torch(
                root / key,
                mllm=genuine(mllm),
                sam=genuine(sam),
                dtype="float32",
                num_queries=QUERIES,
            )
            made[key] = root / key
        return made[key]

    return get
