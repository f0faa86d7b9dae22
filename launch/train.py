"""Trains LENS: `python launch/train.py --help`."""

import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interrupts

if __name__ == "__main__":
    interrupts.quit_at_once()

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    from lens_jax import cli
    from lens_jax import config as configuration

    config = configuration.load(argv)

    cli.prepare_jax()
    import jax

    from lens_jax import processes
    from lens_jax.checkpoints import CheckpointError
    from lens_jax.data.sample import SampleError
    from lens_jax.training import loop, metrics
    from tools.convert_weights import WeightsError

    def start() -> Path:
        """The checkpoint to start from; Hugging Face weights are converted first."""
        if config.model.checkpoint:
            return Path(config.model.checkpoint)
        converted = Path(config.run_dir) / "start"
        processes.by_main(lambda: convert(config, converted))
        return converted

    try:
        processes.start(config.distributed)
        loop.run(config, start)
    except loop.Stopped as stop:
        if processes.is_main():
            print(stop)
    except (
        configuration.ConfigError, CheckpointError, SampleError, WeightsError, OSError,
        loop.NotFinite, metrics.RunError, processes.RemoteError,
    ) as error:  # fmt: skip
        return processes.leave(cli.complain(error))
    except Exception as error:
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


def convert(config, output: Path) -> None:
    """Hugging Face weights to a checkpoint, unless there is one."""
    import jax

    from tools.convert_weights import WeightsError, from_torch

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
    command = [sys.executable, "-m", "tools.convert_weights", "from_torch"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if subprocess.run(command, env=environment).returncode:
        raise WeightsError([f"{model.mllm} and {model.sam} could not be converted, as said above"])


if __name__ == "__main__":
    sys.exit(main())
