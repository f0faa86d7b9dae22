"""The frame around every benchmark: flags, the device, sides timed in turn, the table."""

import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from benchmarks.common import SIZES, Size, SizeName
from lens_jax.aot import tpu
from lens_jax.commands import cli
from lens_jax.flags import PositiveInt, UsageError

T = TypeVar("T")
Device = Literal["cpu", "gpu"]
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # names of devices in JAX and in PyTorch
Chip = Literal["v4", "v5e", "v5p", "v6e"]
# Kinds of TPU that can be compiled for, each with its smallest slice.
CHIPS: dict[Chip, str] = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a table; `ratio` above 1 is in our favour."""

    ours: float
    theirs: float
    ratio: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of a benchmark that runs both sides here."""

    size: SizeName = "small"
    """Size of model and inputs."""
    device: Device = "cpu"
    """Device that ours runs on."""
    repeats: PositiveInt = 5
    """Rounds of both sides."""
    json: Path | None = None
    """File for {name: {ours, theirs, ratio, unit}}."""


def run(
    measure: Callable[[T], tuple[str, dict[str, Comparison]]],
    settings: type[T],
    argv: Sequence[str] | None,
    doc: str,
) -> int:
    """Prints and writes the title and rows that `measure` returns for its flags; no table without
    rows. Returns the exit code, 2 after a mistake.

    Args:
        settings: a dataclass of the flags, `json` among them.
        doc: the module's docstring (`flags.from_doc`).
    """

    def benchmark(options: T) -> None:
        if options.json is not None:  # before minutes are spent on what could not be written
            cli.check_writable(options.json)
        try:
            title, rows = measure(options)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{error.name} is not installed, which this benchmark needs: pip install -e "
                '".[test]" has it'
            ) from error
        if rows:
            report(title, rows, options.json)

    return cli.run_settings(benchmark, settings, argv, doc)


@contextlib.contextmanager
def on_device(options: Options) -> Iterator[Size]:
    """JAX on --device, at the highest precision of products if --size computes in float32."""
    # PyTorch shares the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    use(options.device, options.size)
    size = SIZES[options.size]
    with jax.default_matmul_precision("highest" if size.dtype == jnp.float32 else "default"):
        yield size


def setting(options: Options) -> str:
    """Size, precision and device of both sides, for a table's title."""
    precision = jnp.dtype(SIZES[options.size].dtype).name
    return f"size {options.size}, {precision}, {options.device}"


def use(device: Device, size: SizeName) -> None:
    """Chooses JAX's platform, before anything is computed, and says so."""
    # Otherwise an installed libtpu looks for its chips first.
    jax.config.update("jax_platforms", PLATFORMS[device])
    try:
        cli.announce(f"size {size}", jnp.dtype(SIZES[size].dtype).name)
    except (RuntimeError, AssertionError) as error:  # JAX's, where it finds no such device
        raise UsageError(f"--device {device}: JAX finds none on this machine") from error


def chip(name: Chip, size: SizeName) -> jax.Device:
    """A TPU of this kind to compile for. None need be there, only libtpu."""
    use("cpu", size)
    return tpu.devices(CHIPS[name])[0]


def stop(reason: str) -> None:
    """Ends a benchmark whose sides do not compute the same."""
    raise SystemExit(f"error: {reason}; nothing is timed")


def interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, Float[np.ndarray, "repeats"]]:
    """Seconds of each side, called in turn `repeats` times after one call that does not count.

    A neighbour's load thus falls on all sides alike.
    """
    for side in sides.values():
        jax.block_until_ready(side())
    seconds = {name: np.empty(repeats) for name in sides}
    for i in range(repeats):
        for name, side in sides.items():
            begin = time.perf_counter()
            jax.block_until_ready(side())
            seconds[name][i] = time.perf_counter() - begin
    return seconds


def faster(ours: Float[np.ndarray, "repeats"], theirs: Float[np.ndarray, "repeats"]) -> Comparison:
    """Medians of interleaved seconds; the ratio is the median of the rounds' own ratios."""
    medians = statistics.median(ours), statistics.median(theirs)
    return Comparison(*medians, ratio=statistics.median(theirs / ours), unit="s")


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> Comparison:
    """Both sides, timed in turn."""
    return faster(**interleaved({"ours": ours, "theirs": theirs}, repeats))


def report(title: str, rows: Mapping[str, Comparison], file: Path | None) -> None:
    """Prints a table; writes `{name: {ours, theirs, ratio, unit}}` to `file`."""
    width = max(map(len, rows))
    print(f"\n{title}\n{'':{width}}  {'ours':>12}  {'theirs':>12}  {'ratio':>7}  unit")
    for name, row in rows.items():
        print(f"{name:{width}}  {row.ours:12.5g}  {row.theirs:12.5g}  {row.ratio:7.2f}  {row.unit}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {name: dataclasses.asdict(row) for name, row in rows.items()}
        file.write_text(json.dumps(values, indent=2) + "\n")
