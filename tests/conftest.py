"""The platform of every test: eight virtual CPU devices, exact float32, compiled programs kept.

Tests compile much and compute little: XLA optimizes nothing that takes long.
"""

import os
import tempfile

from tests import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_force_host_platform_device_count=8 {xla.flags(optimization=0)}"
).strip()

import jax

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "lens-jax-cache")
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
