"""Shared by the commands: how they are called, their first line, and how errors are told."""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lens_jax import interpreter  # noqa: F401, the first of all imports that may fail

# isort: split
import jsonargparse

from lens_jax import files, interrupts, progress
from lens_jax.data.sample import SampleError
from lens_jax.files import CheckpointError
from lens_jax.flags import Parser, UsageError, from_doc, nearest, plain

T = TypeVar("T")


def run(
    command: Callable[..., int | None], argv: Sequence[str] | None, *, prog: str, example: str
) -> int:
    """Calls `command` with the flags that its signature and docstring describe.

    Returns what `call` returns, and 130 after Ctrl-C, as `interrupts.run` does.
    """

    def prepared(**options: Any) -> int:
        prepare_jax()  # before orbax is imported, which would take care of the log
        if argv is None:
            quiet()
        return interrupts.run(lambda: command(**options) or 0)

    return call(prepared, parser_of(command, prog=prog, example=example), argv)


def run_settings(
    command: Callable[[T], int | None], settings: type[T], argv: Sequence[str] | None, doc: str
) -> int:
    """`call` for a command whose flags are the fields of a dataclass.

    Args:
        doc: the module's docstring (`flags.from_doc`).
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(**from_doc(doc))
    parser.add_class_arguments(settings, as_group=False)
    return call(lambda **options: command(settings(**options)), parser, argv)


def parser_of(
    command: Callable[..., int | None],
    *,
    prog: str,
    example: str,
    skip: Collection[str] = (),
    **options: Any,
) -> Parser:
    """The parser of the flags that a command's signature and docstring describe.

    Args:
        skip: parameters that are no flags.
        options: of the parser.
    """
    parser = Parser(
        prog=prog,
        description=inspect.getdoc(command).partition("Args:")[0].rstrip(),
        epilog=f"example:\n{example}",
        **options,
    )
    parser.add_function_arguments(command, as_group=False, as_positional=False, skip={*skip})
    for action in list(parser._actions):  # a parameter from_ is the flag --from
        flag = f"--{action.dest.rstrip('_')}"
        if action.dest.endswith("_"):
            action.option_strings = [flag]
            parser._option_string_actions[flag] = action
    return parser


def call(command: Callable[..., int | None], parser: Parser, argv: Sequence[str] | None) -> int:
    """Calls `command` with what is parsed.

    Returns what it returns, None as 0; 2 after a mistake, printed to stderr as one line.
    """
    try:
        options = parser.parse_args(argv).as_dict()
        return command(**{name: plain(value) for name, value in options.items()}) or 0
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
    if argv is None:
        quiet()
        argv = sys.argv[1:]
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        lines = [f"usage: {prog} COMMAND ...\n\n{description}\n"]
        lines += ["commands (COMMAND --help says more):"]
        for name, (command, _) in commands.items():
            lines += [f"  {name:<12} {inspect.getdoc(command).splitlines()[0]}"]
        lines += ["\nexample:", *(example for _, example in commands.values())]
        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # `| head` has read enough; nothing may be flushed at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if name not in commands:
        what = f"unknown command {name} " if name else "give a command "
        return complain(UsageError(what + nearest(name, commands)))
    command, example = commands[name]
    return run(command, list(argv[1:]), prog=f"{prog} {name}", example=example)


def quiet() -> None:
    """Keeps tracebacks off the terminal that are of no use there: of errors that orbax logs and
    raises as well, of its callbacks after a write has failed, and of an interrupt in a callback."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def show(it: "sys.UnraisableHookArgs") -> None:
        closed = isinstance(it.exc_value, RuntimeError) and "loop is closed" in f"{it.exc_value}"
        if not (closed or isinstance(it.exc_value, KeyboardInterrupt)):
            hook(it)

    sys.unraisablehook = show


def prepare_jax() -> None:
    """Sets JAX's compilation cache: what one command compiled, the next one reads; keeps libtpu
    away from machines without a TPU; and has warnings written as lines of their own."""
    progress.show_warnings()
    import jax

    from lens_jax import libtpu

    libtpu.pass_over_if_absent()
    if jax.config.jax_compilation_cache_dir is None:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "lens-jax")
        jax.config.update("jax_compilation_cache_dir", str(cache))


def announce(*facts: object, devices: Iterable[Any] | None = None) -> None:
    """Says on stderr, in a line, on what a command computes (all devices if not given), and how."""
    import jax

    devices = list(jax.devices() if devices is None else devices)
    where = devices[0].device_kind
    if devices[0].platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        where += f" ({cores} cores)"
    if len(devices) > 1:
        where = f"{len(devices)} x {where}"
    if jax.process_count() > 1:
        where += f" in {jax.process_count()} processes"
    said = " · ".join([where, *map(str, facts)])
    progress.write(f"lens-jax: {said}")


def check_writable(file: Path) -> None:
    """Raises OSError where a file could not be written later; makes the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    existed = file.exists()
    file.open("a").close()
    if not existed:
        file.unlink()


def _line(error: Exception) -> str:
    return files.explain(error) if isinstance(error, OSError) else str(error)


def complain(error: Exception) -> int:
    """Prints an error, a line for each, clear of progress bars; returns the exit code for it."""
    for line in getattr(error, "errors", None) or [_line(error)]:
        progress.write(f"error: {files.as_typed(line)}")
    return 2


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
