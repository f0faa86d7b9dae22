"""libtpu where there is no TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lens_jax import libtpu

SCRIPT = """
import os, sys
from lens_jax.commands import (cli)
import jax
os.environ["TPU_WORKER_ID"] = "0"  # a slice says so
cli.prepare_jax()
assert not jax.config.jax_platforms
del os.environ["TPU_WORKER_ID"]
cli.prepare_jax()
jax.devices()
assert all("libtpu.so" not in line for line in open("/proc/self/maps"))
"""


@pytest.mark.skipif(
    any(any(Path("/dev").glob(x)) for x in libtpu.DEVICES), reason="there may be a TPU here"
)
def test_libtpu_is_silent_where_no_tpu_is():
    """It is not even loaded, unless something speaks for a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    if importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("another platform may be here: libtpu is loaded, with nothing to ask about")
    told = ("JAX_", "TPU_", "XLA_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(told)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
