"""Converts a model of LENS-3B's shapes there and back, and measures what that takes.

The weights are random bfloat16, about 9 GB, in an official LENS directory: Qwen2.5-VL-3B, the
context module and SAM 2 large. The measured memory is RssAnon of the converting process, asked
every 10 ms; mapped files are not in it. Needs Linux, and 40 GB of disk.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from lens_jax.commands import cli
from lens_jax.convert_weights import lens_table, parameter_shapes
from lens_jax.convert_weights.writer import Spec, write_model
from lens_jax.model_configs.qwen_vl import write_qwen_vl
from lens_jax.models.lens import LensConfig
from lens_jax.models.qwen_vl import config as qwen_vl_config
from lens_jax.models.sam.config import PRESETS

EXAMPLE = "  python -m tools.measure_conversion --directory /tmp/conversion"

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# config.json of LENS-3B, without the keys that no shape depends on.
QWEN = qwen_vl_config.PRESETS["Qwen2.5-VL-3B-Instruct"]
CONFIG = write_qwen_vl(QWEN) | {
    "architectures": ["SAMR1ForConditionalGeneration_qwen2p5"],
    "model_type": "qwen2_vl",
    "torch_dtype": "bfloat16",
    "num_of_query": 64,
    "if_use_qwen_connector": True,
}


def measure(directory: Path) -> None:
    """Writes random weights of LENS-3B's shapes, converts them there and back, prints a table.

    Args:
        directory: Where to do it; must not exist, and is removed at the end.
    """
    if directory.exists():
        raise cli.UsageError(f"{directory} exists already: name a new directory")
    directory.mkdir(parents=True)
    try:
        size = write_random_lens(directory / "official")
        print(f"official LENS directory, bfloat16: {size / 1e9:.2f} GB", flush=True)
        ours, lens, hf = (str(directory / name) for name in ("ours", "lens", "hf"))
        official = str(directory / "official")
        run = lambda *arguments: print(_row(*arguments), flush=True)  # noqa: E731
        run("from_torch", "--lens", official, "--output", ours)
        run("verify", "--checkpoint", ours, "--torch", official)
        run("to_torch", "--checkpoint", ours, "--layout", "lens", "--output", lens)
        run("verify", "--checkpoint", ours, "--torch", lens)
        shutil.rmtree(lens)
        run("to_torch", "--checkpoint", ours, "--layout", "hf", "--output", hf)
        shutil.rmtree(ours)
        shutil.rmtree(official)
        # The context module drawn fresh, in float32.
        run(
            "from_torch", "--mllm", f"{hf}/mllm", "--sam", f"{hf}/sam", "--output",
            str(directory / "fresh"),
        )  # fmt: skip
    finally:
        shutil.rmtree(directory)


def write_random_lens(directory: Path) -> int:
    """An official LENS directory of random weights; returns its tensors' bytes."""
    config = LensConfig(QWEN, PRESETS["large"])
    shapes = parameter_shapes(config)
    specs = [
        Spec(entry.source, entry.transform.source_shape(shapes[entry.target]), BFLOAT16)
        for entry in lens_table(config).entries
    ]
    directory.mkdir()
    write_model(directory, specs, _random(specs), shard_bytes=5e9)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return sum(spec.nbytes for spec in specs)


def _random(specs: Sequence[Spec]) -> Iterator[np.ndarray]:
    """Values from a pool of normal ones, every tensor from another place in it."""
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**24, np.float32)).astype(BFLOAT16)
    for spec in specs:
        count = spec.nbytes // BFLOAT16.itemsize
        start = int(rng.integers(len(pool)))
        yield np.resize(np.roll(pool, start), count).reshape(spec.shape)


def _row(*arguments: str) -> str:
    """Runs one command of convert_weights; its time and largest RssAnon."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "tools.convert_weights", *arguments])
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = [line.split()[1] for line in status.splitlines() if "RssAnon" in line]
            peak = max([peak, *map(int, anonymous)])
        except OSError:
            break
        time.sleep(0.01)
    if process.wait():
        raise cli.UsageError(f"{' '.join(arguments)}: ended with {process.returncode}")
    seconds = time.monotonic() - start
    return f"{' '.join(arguments)}: {seconds:.0f} s, RssAnon at most {peak * 1024 / 1e9:.2f} GB"


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(measure, argv, prog="python -m tools.measure_conversion", example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
