"""What XLA makes of the rollout of the 3B model on a TPU v5e."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lens_jax import hlo
from lens_jax.models.lens import abstract
from tests.rollout import compile_for_tpu

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, XLA's compiler for TPU, is not installed: pip install libtpu")
    file = tmp_path_factory.mktemp("hlo") / "rollout.txt"
    command = [sys.executable, "-m", compile_for_tpu.__name__, str(file)]
    env = os.environ | compile_for_tpu.ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return hlo.Module(file.read_text())


@pytest.fixture(scope="module")
def step(program):
    """The computation that writes one token of every completion."""
    (loop,) = (loop for loop in program.loops() if program.trips(loop) is None)
    return loop.called("body")


def test_no_collective(program, step):
    assert program.collectives(step) == []


def test_a_step_reads_weights_and_cache_once(program, step):
    size = compile_for_tpu.SIZE
    config = size.config().mllm
    language = jax.tree.leaves(nnx.state(abstract(size.config()).language))
    weights = sum(math.prod(x.shape) for x in language) * np.dtype(size.dtype).itemsize
    tokens = size.prompt + size.group * size.reasoning  # one prompt's keys for its whole group
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = compile_for_tpu.PROMPTS * tokens * per_token * np.dtype(size.dtype).itemsize
    (layers,) = program.loops(step)
    assert program.trips(layers) == config.num_layers
    assert 0.95 < program.traffic(step) / (weights + cache) < 1.1


def test_no_copy_of_weights_in_float32(program):
    """Nothing in float32 of a weight matrix's sizes, in memory or on the way."""
    language = jax.tree.leaves(nnx.state(abstract(compile_for_tpu.SIZE.config()).language))
    sizes = (x.shape[-2:] for x in language if x.ndim > 1)
    matrices = {tuple(sorted(pair)) for pair in sizes if min(pair) > 100}
    shapes = {
        tuple(sorted(int(n) for n in sizes.split(",") if int(n) > 1))
        for instruction in program.instructions()
        for sizes in re.findall(r"f32\[([\d,]+)\]", instruction.shape)
    }
    assert shapes and len(matrices) > 3
    assert not {shape for shape in shapes if shape[-2:] in matrices}
