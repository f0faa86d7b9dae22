"""The commands. Each is a module with a `main`; `launch/NAME.py` starts it as a process."""

import importlib
import os
import sys
from pathlib import Path

from lens_jax import interpreter, interrupts  # the interpreter before all that may fail


def start(name):
    """Runs a command, with the process's arguments, and ends the process with its exit code."""
    interrupts.quit_at_once()
    if not any("distributed" in word for word in sys.argv) and not _has_accelerator():
        # XLA reports every compilation of two minutes on a CPU, into the progress bar.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    code = importlib.import_module("lens_jax.commands." + name).main()
    if code == interrupts.EXIT_CODE and not _has_others():
        # Nobody waits while the interpreter takes itself apart.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _has_accelerator():
    """Whether anything in /dev looks like a TPU or GPU, of whose errors XLA's log tells more."""
    names = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd")
    return any(any(Path("/dev").glob(name)) for name in names)


def _has_others():
    """Whether other processes of the run have to be taken leave of."""
    distributed = getattr(sys.modules.get("jax"), "distributed", None)  # it may be half imported
    return distributed is not None and distributed.is_initialized()
