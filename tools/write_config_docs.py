"""docs/config.md, from the configuration itself: `python -m tools.write_config_docs --help`."""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from lens_jax import config, flags
from lens_jax.commands import cli

FILE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
HEAD = """\
# Every key of a configuration

A YAML file has one section for each heading below; on the command line a key is `--section.key`.
Flags win over the file, the file over the defaults, and `launch/train.py --print_config` shows the
result. The defaults are the published recipe for RefCOCO. *Made by
`python -m tools.write_config_docs` from `lens_jax/config/sections.py`.*
"""


def page() -> str:
    """docs/config.md."""
    return HEAD + "".join(_section(config.RunConfig, ""))


def _section(cls: type, path: str) -> list[str]:
    """The table of a dataclass, then those of the sections in it."""
    title = f"`{path}`" if path else "Top level"
    lines = [f"\n## {title}\n\n{_flat(inspect.getdoc(cls))}\n\n"]
    lines.append("| key | values | default | meaning |\n|---|---|---|---|\n")
    explained, hints, below = _explained(cls), typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(hints[field.name]):
            below += _section(hints[field.name], name)
            continue
        shown = f"`{flags.shown(field.default)}`"
        meaning = explained[field.name]
        cells = (f"`{field.name}`", flags.words(hints[field.name]), shown, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return lines + below


def _explained(cls: type) -> dict[str, str]:
    """Key -> the docstring under it, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(base)).body[0].body
        for field, text in itertools.pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[field.target.id] = _flat(text.value.value)
    return found


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def write() -> None:
    """Writes docs/config.md from the dataclasses of lens_jax/config."""
    FILE.write_text(page(), encoding="utf-8")
    print(FILE)


def main(argv: Sequence[str] | None = None) -> int:
    example = "  python -m tools.write_config_docs"
    return cli.run(write, argv, prog="python -m tools.write_config_docs", example=example)


if __name__ == "__main__":
    sys.exit(main())
