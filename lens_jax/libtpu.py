"""libtpu on machines without a TPU: it is not loaded, or asks nobody for its hosts."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

# libtpu reads these when it is loaded: nothing to ask about, and not the only process.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# Where Linux shows TPUs: /dev/accel0 of older drivers, /dev/vfio/0 of newer ones.
DEVICES = ("accel*", "vfio/[0-9]*")


def be_alone() -> None:
    """Has libtpu ask no metadata server, and share the machine with other processes that load it.

    Call it before libtpu is loaded.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def pass_over_if_absent() -> None:
    """Keeps JAX from loading libtpu where there is no TPU, before it looks for devices.

    It would take over signal handlers and warn that it cannot find hosts. Nothing changes where
    anything speaks for a TPU, or where the platform has been chosen.
    """
    import jax

    told = [name for name in os.environ if name.startswith(("TPU_", "JAX_FORCE_TPU"))]
    told = set(told) - {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}  # JAX and libtpu set these
    if jax.config.jax_platforms or told or any(any(Path("/dev").glob(x)) for x in DEVICES):
        return
    if importlib.util.find_spec("libtpu") is None:
        return
    plugins = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(
        group="jax_plugins"
    )
    if not plugins:
        jax.config.update("jax_platforms", "cpu")
        return
    # Only JAX knows which of the others runs here. libtpu is loaded, and has nothing to ask about.
    be_alone()
