"""Trains LENS: `python launch/train.py --help`."""

import errno
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lens_jax.training.stopping import Stopping


ROOT = Path(__file__).resolve().parents[2]
FULL = os.strerror(errno.ENOSPC)  # what libraries put into errors of their own


def main(argv: list[str] | None = None) -> int:
    from lens_jax.commands import cli
    from lens_jax.training.stopping import Stopping

    if argv is None:
        cli.quiet()
    with Stopping() as stopping:  # before all else is imported, which takes seconds
        try:
            code = train(argv, stopping)
        except KeyboardInterrupt:
            if not stopping.asked:
                raise
        except Exception:
            if not stopping.raised:  # else it comes of the interruption
                raise
        else:
            return code
        stopping.report(f"stopped: {stopping.where}")
        return stopping.code


def train(argv: list[str] | None, stopping: "Stopping") -> int:
    from lens_jax import config as configuration
    from lens_jax.commands import cli

    argv = sys.argv[1:] if argv is None else argv
    config = configuration.load(argv)

    cli.prepare_jax()
    import jax

    from lens_jax.checkpoints import CheckpointError
    from lens_jax.convert_weights import WeightsError
    from lens_jax.data.sample import SampleError
    from lens_jax.distribution import processes
    from lens_jax.training import job, metrics, run, setup

    converted = Path(config.run_dir) / "start"

    def make() -> Path:
        if processes.is_main():
            cli.announce(*configuration.config_files(argv), config.run_dir, config.precision)
        if config.model.checkpoint:
            return Path(config.model.checkpoint)
        processes.by_main(lambda: convert(config, converted, stopping))
        return converted

    start = setup.Start(lambda holds: check(config, converted if holds else None), make)
    try:
        processes.start(config.distributed)
        stopping.alone = jax.process_count() == 1
        run.run(config, start, stopping)
    except job.Stopped as stop:
        if processes.is_main():
            stopping.report(f"{stop}")
        return stopping.code
    except CheckpointError as error:
        if FULL in f"{error}":
            error = CheckpointError(f"{error}: make room, then give the same command again")
        return processes.leave(cli.complain(error))
    except (
        configuration.ConfigError, SampleError, WeightsError,
        job.NotFinite, metrics.RunError, processes.RemoteError,
    ) as error:  # fmt: skip
        return processes.leave(cli.complain(error))
    except Exception as error:
        if stopping.raised:
            raise
        if reason := no_room(error, config.run_dir):
            begin = f"{reason}; {stopping.where}"
            return processes.leave(cli.complain(OSError(begin)))
        if isinstance(error, OSError):
            return processes.leave(cli.complain(error))
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # Most likely another process has died and a transfer from it broke. When its heartbeats
            # have been missing for long enough, JAX says which one it was and ends this process.
            wait = config.distributed.heartbeat_timeout + 5
            print(f"{who} ends within {wait} s", end="; ")
            print("if another one died, what follows says which", flush=True)
            time.sleep(wait)
        print(f"{who} ends by its own error, as above", flush=True)
        return processes.leave(1)
    return 0


def no_room(error: Exception, run_dir: str) -> str | None:
    """Says of an error that a full disk or full memory caused what to do; None for any other."""
    from lens_jax import files

    if files.is_full(error):
        where = getattr(error, "filename", None) or run_dir
        return files.explain(OSError(errno.ENOSPC, FULL, where))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in f"{error}":
        said = " ".join(f"{error}".split())[:200]
        return (
            "there is not enough memory: try, in this order, --remat full, a smaller "
            "per_device_batch_size of the stage, more devices with --mesh.fsdp, --precision "
            f"bfloat16 ({said})"
        )
    return None


def check(config, converted: Path | None) -> dict[str, Any]:
    """lens_config.json of the checkpoint a run starts from, seen to be one as far as that is quick.

    Args:
        converted: where an earlier start has put it, if that still holds.
    """
    from lens_jax import checkpoints
    from lens_jax.convert_weights import check_torch
    from lens_jax.data.processor import Processor
    from lens_jax.inference import Generation

    model = config.model
    start = Path(model.checkpoint) if model.checkpoint else converted
    if start is None or not (model.checkpoint or start.exists()):
        return check_torch(Path(model.mllm), Path(model.sam), model.num_queries, config.seed)
    found = checkpoints.read_config(start)
    checkpoints.model_shapes(start, found)
    checkpoints.check_sizes(start)
    Processor.from_pretrained(start)
    Generation.from_pretrained(start)
    return found


def convert(config, output: Path, stopping: "Stopping") -> None:
    """Hugging Face weights to a checkpoint, unless there is one."""
    import jax

    from lens_jax.convert_weights import WeightsError, from_torch

    if output.exists():
        return
    model = config.model
    flags = {
        "output": output,
        "mllm": Path(model.mllm),
        "sam": Path(model.sam),
        "num_queries": model.num_queries,
        "seed": config.seed,
    }
    if jax.process_count() == 1:
        return from_torch(**flags)
    # Writing a checkpoint takes all processes of a run: this one is written by a run of its own.
    command = [sys.executable, "-m", "lens_jax.convert_weights", "from_torch"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    failed = subprocess.run(command, env=environment).returncode
    if failed and not stopping.asked:  # Ctrl-C reaches it, too; the processes then stop together
        raise WeightsError(f"{model.mllm} and {model.sam} could not be converted, as said above")
