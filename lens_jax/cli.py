"""What the commands share: flags from a function's signature, and mistakes as one line."""

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from lens_jax import files, interrupts, progress

# What jsonargparse calls a type -> what it asks for.
_TYPES = {
    "PositiveInt": "a whole number of at least 1",
    "<class 'bool'>": "true or false",
}


class UsageError(Exception):
    """A command that cannot be carried out as given; one line that says what to change.

    `errors` holds several such lines where all of them are known at once.
    """

    @property
    def errors(self) -> list[str]:
        return [str(self)]


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


class Parser(jsonargparse.ArgumentParser):
    """Raises UsageError, one line, where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(
            _explain(message, [f"--{key.rstrip('_')}" for key in vars(self.get_defaults())])
        )


class Flags(argparse.ArgumentParser):
    """argparse's own, for flags that no function's signature describes; fails as `Parser` does."""

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    @property
    def names(self) -> Iterable[str]:
        return self._option_string_actions.keys()

    def error(self, message: str) -> NoReturn:
        raise UsageError(_explain(message, self.names))


def run(
    command: Callable[..., int | None], argv: Sequence[str] | None, *, prog: str, example: str
) -> int:
    """Calls `command` with the flags that its signature and docstring describe.

    Returns what it returns, None as 0; 2 after a mistake, printed to stderr as one line; 130 after
    Ctrl-C, as `interrupts.run` does.
    """
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(command).partition("Args:")[0].rstrip(),
        epilog=f"example:\n{example}",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    parser.add_function_arguments(command, as_group=False, as_positional=False)
    for action in list(parser._actions):  # a parameter from_ is the flag --from
        flag = f"--{action.dest.rstrip('_')}"
        if action.dest.endswith("_"):
            action.option_strings = [flag]
            parser._option_string_actions[flag] = action
    try:
        options = parser.parse_args(None if argv is None else list(argv)).as_dict()
        # Shells leave the ~ of --image=~/a.png to the program.
        for name, value in options.items():
            if isinstance(value, Path):
                options[name] = Path(os.path.expanduser(value))
    except UsageError as error:
        return complain(error)

    from lens_jax.checkpoints import CheckpointError
    from lens_jax.data.sample import SampleError

    prepare_jax()
    try:
        return interrupts.run(lambda: command(**options) or 0)
    except (UsageError, CheckpointError, SampleError, OSError) as error:
        return complain(error)


def run_one_of(
    commands: Mapping[str, tuple[Callable[..., int | None], str]],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> int:
    """`run` for the command that the first argument names.

    Args:
      commands: name -> the function, and the example in its help.
      description: what `--help` without a command says above the list of commands.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND ...\n\n{description}\n\ncommands (COMMAND --help says more):")
        for name, (command, _) in commands.items():
            print(f"  {name:<12} {inspect.getdoc(command).splitlines()[0]}")
        return 0
    if name not in commands:
        what = f"unknown command {name} " if name else "give a command "
        return complain(UsageError(what + nearest(name, commands)))
    command, example = commands[name]
    return run(command, argv[1:], prog=f"{prog} {name}", example=example)


def prepare_jax() -> None:
    """Sets JAX's compilation cache: what one command compiled, the next one reads; keeps libtpu
    away from machines without a TPU; and has warnings written as lines of their own."""
    progress.show_warnings()
    import jax

    from lens_jax import tpu

    tpu.pass_over_if_absent()
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "lens-jax")
        jax.config.update("jax_compilation_cache_dir", str(cache))


def complain(error: Exception) -> int:
    """Prints an error, a line for each, clear of progress bars; returns the exit code for it."""
    match error:
        case UsageError():
            lines = error.errors
        case OSError():
            lines = [files.explain(error)]
        case _:
            lines = [str(error)]
    for line in lines:
        progress.write(f"error: {line}")
    return 2


def _explain(message: str, flags: Iterable[str]) -> str:
    """jsonargparse's message as one line that names the flag and what it should be."""
    message = " ".join(message.split())
    if required := re.search(r"arguments are required: (.+)", message):
        names = (name.strip("-_") for name in required[1].split(", "))
        return "give " + ", ".join(f"--{name}" if name.islower() else name for name in names)
    if unknown := re.search(r"unrecognized arguments: (.+)", message):
        return f"unknown: {unknown[1]} " + nearest(unknown[1].split()[0].split("=")[0], flags)
    wrong = re.search(r'key "(?P<key>\w+)": (?P<why>.+)', message)
    if not wrong:
        return message
    key, why = wrong["key"].rstrip("_"), wrong["why"]
    value: Any = re.search(r"(?:Got value|Given value): (.+)", why)
    given = f", got {value[1]}" if value else ""
    if choices := re.search(r"typing\.Literal\[(.+?)\]", why):
        return f"--{key}: expected one of {choices[1].replace(chr(39), '')}{given}"
    for name, expected in _TYPES.items():
        if name in why:
            return f"--{key}: expected {expected}{given}"
    return f"--{key}: {why}"


def table(lines: Sequence[Sequence[Any]], left: Collection[int] = (0,)) -> str:
    """Aligned text, the columns `left` to the left and all others to the right."""
    text = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in text
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """What a mistyped name may have meant, in brackets."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"(did you mean {near[0]}?)" if near else "(--help lists what there is)"
