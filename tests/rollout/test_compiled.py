"""What XLA makes of the rollout of the 3B model on a TPU v5e."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from lens_jax.aot import hlo
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.qwen_vl.config import PRESETS
from lens_jax.models.sam.config import PRESETS as SAM2

pytestmark = pytest.mark.compiled

ROOT = Path(__file__).parents[2]
SHAPES = LensConfig(PRESETS["Qwen2.5-VL-3B-Instruct"], SAM2["large"])
CHIPS, PROMPTS, GROUP = 4, 8, 8  # PROMPTS on each chip
PROMPT, COMPLETION = 430, 256  # tokens
ITEMSIZE = 2  # bfloat16


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, XLA's compiler for TPU, is not installed: pip install libtpu")
    folder = tmp_path_factory.mktemp("hlo")
    flags = {
        "config": ROOT / "configs" / "lens_3b_refcoco.yaml",
        "topology": "v5e:2x2",
        "program": "grpo.rollout",
        "hlo_dir": folder,
        "mesh.data": CHIPS,
        "grpo.batch_size": CHIPS * PROMPTS,
        "data.eval_batch_size": CHIPS * PROMPTS,
        "data.prompt_tokens": f"[{PROMPT}]",
        "data.windows": "[4]",
        "rollout.max_new_tokens": COMPLETION,
    }
    argv = [str(x) for key, value in flags.items() for x in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "compile.py", *argv],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    # Four copies of parameters and moments do not fit on such chips; the program by itself does.
    assert done.returncode == 1, done.stderr[-3000:]
    return hlo.Module((folder / "grpo.rollout.txt").read_text())


@pytest.fixture(scope="module")
def step(program):
    """The computation that writes one token of every completion."""
    (loop,) = (loop for loop in program.loops() if program.trips(loop) is None)
    return loop.called("body")


def test_no_collective(program, step):
    assert program.collectives(step) == []


def test_a_step_reads_weights_and_cache_once(program, step):
    config = SHAPES.mllm
    language = jax.tree.leaves(nnx.state(abstract(SHAPES).language))
    weights = ITEMSIZE * sum(math.prod(x.shape) for x in language)
    tokens = PROMPT + GROUP * COMPLETION  # one prompt's keys for its whole group
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = ITEMSIZE * PROMPTS * tokens * per_token
    (layers,) = program.loops(step)
    assert program.trips(layers) == config.num_layers
    assert 0.95 < program.traffic(step) / (weights + cache) < 1.1


def test_no_copy_of_weights_in_float32(program):
    """Nothing in float32 of a weight matrix's sizes, in memory or on the way."""
    language = jax.tree.leaves(nnx.state(abstract(SHAPES).language))
    sizes = (x.shape[-2:] for x in language if x.ndim > 1)
    matrices = {tuple(sorted(pair)) for pair in sizes if min(pair) > 100}
    shapes = {
        tuple(sorted(int(n) for n in sizes.split(",") if int(n) > 1))
        for instruction in program.instructions()
        for sizes in re.findall(r"f32\[([\d,]+)\]", instruction.shape)
    }
    assert shapes and len(matrices) > 3
    assert not {shape for shape in shapes if shape[-2:] in matrices}
