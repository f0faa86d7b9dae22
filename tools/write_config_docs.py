"""docs/config.md, from the configuration itself: `python -m tools.write_config_docs --help`."""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from lens_jax import config, flags
from lens_jax.commands import cli
from lens_jax.config import reading

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
    helps = {action.dest: action.help for action in reading.make_parser()._actions}
    lines = [HEAD]
    for path, section in [("", config.RunConfig), *reading.sections_of(config.RunConfig)]:
        title = f"`{path}`" if path else "Top level"
        lines.append(f"\n## {title}\n\n{_flat(inspect.getdoc(section))}\n\n")
        lines.append("| key | values | default | meaning |\n|---|---|---|---|\n")
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                continue
            meaning = _flat(helps[f"{path}.{field.name}".lstrip(".")])
            default = f"`{flags.shown(field.default)}`"
            cells = (f"`{field.name}`", flags.words(field.type), default, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)


def _flat(text: str) -> str:
    return " ".join(text.split())


def write() -> None:
    """Writes docs/config.md from the dataclasses of lens_jax/config."""
    FILE.write_text(page(), encoding="utf-8")
    print(FILE)


def main(argv: Sequence[str] | None = None) -> int:
    example = "  python -m tools.write_config_docs"
    return cli.run(write, argv, prog="python -m tools.write_config_docs", example=example)


if __name__ == "__main__":
    sys.exit(main())
