"""The command line: `python -m tools.convert_weights COMMAND --help`."""

import inspect
import os
import sys
from collections.abc import Sequence

# Conversion computes nothing: no accelerator is woken, nor waited for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jsonargparse

from lens_jax.checkpoints import CheckpointError
from tools.convert_weights.convert import Conversion, from_torch
from tools.convert_weights.table import WeightsError


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 2 means that something is wrong, printed, and nothing was written."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m tools.convert_weights",
        description="Official PyTorch weights to checkpoints of lens-jax. Reads tensor by tensor;\n"
        "nothing is written unless every tensor has its place.",
        formatter_class=_Formatter,
    )
    command = jsonargparse.ArgumentParser(
        description=inspect.getdoc(from_torch).partition("Args:")[0].rstrip(),
        formatter_class=_Formatter,
    )
    command.add_function_arguments(from_torch, as_group=False, as_positional=False)
    parser.add_subcommands().add_subcommand(
        "from_torch", command, help="Qwen-VL + SAM 2, or an official LENS, to a checkpoint"
    )
    options = parser.parse_args(argv)
    arguments = options.from_torch.as_dict()
    try:
        conversion = from_torch(**arguments)
    except (WeightsError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    print(_summary(arguments["output"], conversion))
    return 0


def _summary(output: object, conversion: Conversion) -> str:
    lines = [f"dropped {name}" for name in conversion.dropped]
    lines.append(
        f"{output}: {conversion.tensors} tensors, {conversion.unused} carried along unused, "
        f"{len(conversion.dropped)} dropped"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
