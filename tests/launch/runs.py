"""Runs that are short, and runs of several processes on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


def arguments(checkpoint, data_dir, run_dir, **more) -> list[str]:
    """Flags of a run of a few steps of both stages."""
    flags = {
        "run_dir": run_dir,
        "model.checkpoint": checkpoint,
        "data.data_dir": data_dir,
        "data.shapes.train_scenes": 0,
        # Golden's tokenizer spells words out, and its windows are four times smaller.
        "data.prompt_tokens": "[256]",
        "data.windows": "[4]",
        "data.answer_tokens": "[96]",
        "data.eval_limit": 3,
        "data.eval_batch_size": 2,
        "samples": 2,
        "alignment.steps": 2,
        "alignment.batch_size": 2,
        "grpo.steps": 3,
        "grpo.batch_size": 2,
        "grpo.num_generations": 2,
        "rollout.max_new_tokens": 8,
        "checkpoint.every": 1,
        "mesh.data": 1,
        "remat": "full",
    } | more
    return [str(x) for key, value in flags.items() for x in (f"--{key}", value)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(commands: Sequence[Sequence[str]], logs: Path, *, devices: int) -> list[subprocess.Popen]:
    """Python processes with so many CPU devices each; what they say goes to LOGS.<number>."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(ROOT),
    }
    running = []
    for number, command in enumerate(commands):
        with log_of(logs, number).open("ab") as output:
            running.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    env=environment,
                    cwd=ROOT,
                    stdout=output,
                    stderr=output,
                )
            )
    return running


def log_of(logs: Path, number: int) -> Path:
    return logs.with_name(f"{logs.name}.{number}")


def finish(running: Sequence[subprocess.Popen], logs: Path, timeout: float = 600) -> None:
    """Waits until all have ended well."""
    try:
        codes = [process.wait(timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    said = "\n".join(log_of(logs, i).read_text()[-3000:] for i in range(len(running)))
    assert codes == [0] * len(running), said
