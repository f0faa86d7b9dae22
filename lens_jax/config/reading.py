"""A configuration from defaults < YAML files < flags."""

import argparse
import dataclasses
import difflib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import yaml

from lens_jax import flags
from lens_jax.config.checks import validate
from lens_jax.config.keys import dump_yaml, flatten, key_names, leaves
from lens_jax.config.sections import ConfigError, RunConfig
from lens_jax.files import explain

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"

_EPILOG = """\
example:
  python launch/train.py --config configs/tiny.yaml --run_dir runs/short \\
      --alignment.steps 20 --grpo.steps 20 --grpo.learning_rate 3e-5 --mesh.data 1

The flags above are the keys of a YAML file with one section for each dotted prefix. Flags win over
the file, the file over the defaults; --print_config shows the result. A run writes what it used to
RUN_DIR/config.yaml; --config RUN_DIR/config.yaml --run_dir ANOTHER repeats it."""


_NOT_READ = "no configuration can be read from it"  # begins what is wrong with a whole file


class _Parser(flags.Parser):
    """Raises ConfigError, one line, where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(_explain(message, self))


def _explain(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's message as one line that names the key and what it should be."""
    message = " ".join(message.split())
    if message.startswith("Unexpected config:"):
        found = message.partition(":")[2].strip() or "nothing"
        return f"{_NOT_READ}: expected sections and keys with their values, found {found}"
    if message.startswith("Problems parsing config:"):
        where = ' in "<unicode string>"'
        return f"{_NOT_READ}: {message.partition(':')[2].strip().replace(where, '')}"
    unknown = re.search(
        r"unrecognized arguments: --(?P<flag>[\w.]+)"
        r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'"
        r"|Option '(?P<top>[\w.]+)' is not accepted",
        message,
    )
    if unknown:
        name = unknown["flag"] or unknown["top"] or f"{unknown['group']}.{unknown['member']}"
        known = [*key_names(), *(["config", "print_config"] if unknown["flag"] else [])]
        if name in dict(sections_of(RunConfig)):
            return f"{name} is a section: give its keys, --{name}.KEY VALUE"
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "")
    if message.startswith("unrecognized arguments: "):
        given = message.removeprefix("unrecognized arguments: ")
        return f"unknown: {given}; a key is given as --KEY VALUE, a file as --config FILE.yaml"
    return flags.explain(message, parser, name="{}".format)


def load(argv: Sequence[str] | None = None, default_config: Path = DEFAULT_CONFIG) -> RunConfig:
    """Parses a command line (default: the process's). Prints and exits on --help, --print_config,
    and with code 2 on a mistake.

    `default_config` is read when no --config is given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    files = config_files(argv, default_config)
    if not _config_files(argv):
        argv = ["--config", *files, *argv]
    try:
        for file in filter(None, files):  # one without a name is the parser's to complain of
            Path(file).open("rb").close()
        if {"-h", "--help"} & set(argv):
            print(_help(files), end="")
            sys.exit(0)
        parsed = make_parser().parse_args(argv)
        config = _build(RunConfig, parsed.as_dict())
        if parsed.print_config:
            print(dump_yaml(config), end="")
            sys.exit(0)
        validate(config)
    except (ConfigError, UnicodeDecodeError, OSError) as error:
        reason = _reason(error)
        if isinstance(error, OSError):
            reason = f"--config: {explain(error)}"
        elif reason.startswith(_NOT_READ):
            reason = f"{', '.join(files)}: {reason}"
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    if config.run_dir is None:
        name = Path(str(parsed.config[-1])).stem
        config = dataclasses.replace(config, run_dir=str(Path("runs") / name))
    return config


def config_files(argv: Sequence[str], default_config: Path = DEFAULT_CONFIG) -> list[str]:
    """The files that a command line reads, in its order."""
    if default_config.is_relative_to(Path.cwd()):
        default_config = default_config.relative_to(Path.cwd())
    return _config_files(argv) or [str(default_config)]


def read_yaml(file: str | os.PathLike[str]) -> RunConfig:
    """The configuration in a file, such as a run's config.yaml. Raises ConfigError."""
    try:
        return _build(RunConfig, make_parser().parse_path(str(file)).as_dict())
    except (ConfigError, UnicodeDecodeError, OSError, TypeError) as error:
        raise ConfigError(f"{file}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file of a configuration cannot be read, in a line."""
    if isinstance(error, UnicodeDecodeError):
        return f"{_NOT_READ}: it is not UTF-8 at byte {error.start}, save it as UTF-8"
    return " ".join(str(error).split())


def _config_files(argv: Sequence[str]) -> list[str]:
    """The values of --config on a command line."""
    files = []
    for arg, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if arg == "--config" or arg.startswith("--config="):
            files.append(arg.partition("=")[2] or after)
    return files


def make_parser() -> _Parser:
    """The parser of a run's command line, with a flag for each key."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        prog="launch/train.py",
        usage="launch/train.py [--config FILE.yaml] [--SECTION.KEY VALUE ...] [--print_config]",
        description="Trains LENS: alignment (stage 1), then GRPO (stage 2).",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="A YAML file; without it configs/tiny.yaml.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Prints what file and flags make together."
    )
    parser.add_class_arguments(RunConfig)
    for name, section in sections_of(RunConfig):
        action = next(action for action in parser._actions if action.dest == name)
        action.help = argparse.SUPPRESS  # a file for the section alone
        del parser._option_string_actions[action.option_strings[0]]
        group = parser.groups[name]
        group.title, group.description = f"{name}.*", inspect.getdoc(section)
    return parser


def sections_of(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The dotted names of the sections, each with its class."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            name = f"{path}{field.name}"
            yield name, field.type
            yield from sections_of(field.type, f"{name}.")


def _help(files: Sequence[str]) -> str:
    """The page of --help, with the defaults that hold with these files."""
    parser = make_parser()
    parsed = parser.parse_args([f"--config={file}" for file in files])
    values = leaves(_build(RunConfig, parsed.as_dict()))
    named = {
        key: f", from {file}"
        for file in files
        for key in flatten(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    }
    for action in parser._actions:
        if action.dest in values:
            action.default, action.source = values[action.dest], named.get(action.dest, "")
    return parser.format_help()


def _build(cls: type, values: Any, section: str = "") -> Any:
    """The frozen dataclass of a parsed namespace, sections by recursion."""
    if not isinstance(values, dict):
        raise ConfigError(f"{section}: expected a section with keys of its own, got {values}")
    members = {}
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            value = _build(field.type, value, f"{section}.{field.name}".lstrip("."))
        members[field.name] = flags.plain(value)
    return cls(**members)
