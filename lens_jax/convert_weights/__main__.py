"""The command line: `python -m tools.convert_weights COMMAND --help`."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from lens_jax import interrupts
from lens_jax.commands import cli
from lens_jax.convert_weights.convert import Conversion, from_torch
from lens_jax.convert_weights.export import Export, to_torch
from lens_jax.convert_weights.verify import Verification, verify
from lens_jax.progress import counted

DESCRIPTION = """\
Official PyTorch weights to checkpoints of lens-jax, and back. Reads and writes tensor by tensor;
nothing appears unless every tensor has its place."""


def _printed(
    command: Callable[..., Conversion | Export | Verification],
) -> Callable[..., int]:
    """The command as the command line runs it: prints what came out, returns the exit code."""

    @functools.wraps(command)
    def run(**options) -> int:
        interrupts.tell(lambda: "nothing was written")
        if options.get("forward"):
            cli.announce(options["checkpoint"], options["torch"], "float32")
        result = command(**options)
        match result:
            case Conversion():
                lines = [f"dropped {name}" for name in result.dropped]
                if options["mllm"] and not options["context"]:
                    lines.append(
                        "note: the context module is drawn fresh: masks mean nothing before "
                        "alignment (stage 1)"
                    )
                lines.append(
                    f"{options['output']}: {counted(result.tensors, 'tensor')}, {result.unused} "
                    f"carried along unused, {len(result.dropped)} dropped"
                )
            case Export():
                lines = [f"note: {note}" for note in result.notes]
                lines.append(f"{options['output']}: {counted(result.tensors, 'tensor')}")
            case Verification():
                lines = [*result.compared, *(f"differs: {line}" for line in result.differences)]
                lines.append(
                    counted(len(result.differences), "difference")
                    if result.differences
                    else "all agree"
                )
        print("\n".join(lines))
        return int(isinstance(result, Verification) and bool(result.differences))

    return run


COMMANDS = {
    "from_torch": (
        _printed(from_torch),
        """\
  python -m tools.convert_weights from_torch --mllm Qwen2.5-VL-3B-Instruct \\
      --sam sam2_hiera_large.pt --output checkpoints/start""",
    ),
    "to_torch": (
        _printed(to_torch),
        """\
  python -m tools.convert_weights to_torch --checkpoint runs/lens/final --layout lens \\
      --output LENS-3B-mine""",
    ),
    "verify": (
        _printed(verify),
        """\
  python -m tools.convert_weights verify --checkpoint checkpoints/lens-3b --torch LENS-3B""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 2 means that something is wrong, printed, and nothing was written."""
    return cli.run_one_of(
        COMMANDS, argv, prog="python -m tools.convert_weights", description=DESCRIPTION
    )


def process() -> NoReturn:
    """Runs the command line as a process of its own."""
    if "JAX_PLATFORMS" not in os.environ:
        # Conversion computes nothing: no accelerator is woken, nor waited for.
        jax.config.update("jax_platforms", "cpu")
    # As after an interrupt, what has been written so far is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())


if __name__ == "__main__":
    process()
