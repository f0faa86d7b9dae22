"""Flags of the commands: what they ask for in words, their help, and mistakes as one line."""

import argparse
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jsonargparse
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

# A path in a configuration: text, for it may name a bucket.
Place = Annotated[str, "path"]

# What values of a type are.
_WORDS = {
    bool: "true or false",
    str: "text",
    int: "whole number",
    float: "number",
    Path: "path",
    type(None): "null",
    PositiveInt: "whole number of at least 1",
    NonNegativeInt: "whole number of at least 0",
    PositiveFloat: "number above 0",
    NonNegativeFloat: "number of at least 0",
    ClosedUnitInterval: "number from 0 to 1",
    OpenUnitInterval: "number between 0 and 1",
}


class UsageError(Exception):
    """A command that cannot be carried out as given; one line that says what to change.

    `errors` holds several such lines where all of them are known at once.
    """

    @property
    def errors(self) -> list[str]:
        return [str(self)]


def words(hint: Any) -> str:
    """Describes the values of a type in words."""
    args = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return args[1]
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin in (tuple, list):
        if origin is list or args[-1] is ...:
            return f"list in brackets, each item {with_article(words(args[0]))}"
        return "[" + ", ".join(map(words, args)) + "]"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(words, args))
    return _WORDS[hint]


def with_article(said: str) -> str:
    """`said` as it stands in a sentence: a path, one of red, green."""
    return f"a {said}" if re.match("whole|number|path|list", said) else said


def plain(value: Any) -> Any:
    """A parsed value as the program takes it: plain numbers for jsonargparse's restricted ones,
    which are subclasses; tuples for lists; paths without ~, which shells leave in --image=~/a."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value))
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def from_doc(doc: str) -> dict[str, str]:
    """Options of a parser from a module's docstring: its indented lines are the example."""
    lines = doc.splitlines()
    example = "\n".join(line[2:] for line in lines if line.startswith("    "))
    text = "\n".join(line for line in lines if not line.startswith("    "))
    return {
        "prog": re.search(r"python ((?:-m )?\S+)", example)[1].replace("-m", "python -m"),
        "description": re.sub(r"\n{3,}", "\n\n", text).strip(),
        "epilog": f"example:\n{example}",
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that a mistyped one may have meant, in brackets."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"(did you mean {near[0]}?)" if near else "(--help lists what there is)"


def shown(value: Any) -> str:
    """A value as it is written in a YAML file, and on a command line."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hint(action: argparse.Action) -> Any:
    """The type that a flag's value has."""
    return getattr(action, "_typehint", None) or action.type or str


def _value_words(action: argparse.Action) -> str:
    """Describes a flag's values; not null where that is the default: it is then left out."""
    hint = _hint(action)
    if action.default is None and type(None) in typing.get_args(hint):
        hint = typing.Union[tuple(x for x in typing.get_args(hint) if x is not type(None))]  # noqa: UP007
    return words(hint)


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of descriptions and examples; says types in words."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _expand_help(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return action.help
        text = action.help + ("" if action.help[-1] in ".?!" else ".")
        facts = [] if isinstance(action, jsonargparse.ActionConfigFile) else [_value_words(action)]
        source = getattr(action, "source", None)  # of its default, set in a configuration's parser
        if action.required and action.option_strings:
            facts.append("required")
        elif action.default not in (None, "", argparse.SUPPRESS) or source is not None:
            facts.append(f"default: {shown(action.default)}{source or ''}")
        return f"{text} ({'; '.join(facts)})" if facts else text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return self._metavar_formatter(action, "")(1)[0]
        names = [name for name in action.option_strings if not name.endswith("+")]
        value = self._format_args(action, "")
        return ", ".join(names) + (f" {value}" if value else "")

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_args(action, default_metavar)
        return action.metavar if _is_named(action) else _placeholder(_hint(action))


def _is_named(action: argparse.Action) -> bool:
    """Whether we gave its value a name: jsonargparse's own are {a,b} and [ITEM,...]."""
    return bool(action.metavar) and not re.search(r"[{\[]", action.metavar)


def _placeholder(hint: Any) -> str:
    """The stand-in for a value in a usage line."""
    said = words(hint).removesuffix(" or null")
    if said == "true or false":
        return "true|false"
    if said.startswith("one of "):
        choices = said.removeprefix("one of ").replace(", ", "|")
        return choices if len(choices) <= 40 else "NAME"
    if said.startswith("list"):
        return "[A,B,...]"
    kinds = {"whole": "N", "number": "X", "path": "PATH", "text": "TEXT"}
    return kinds[said.split()[0]]


class Parser(jsonargparse.ArgumentParser):
    """Raises UsageError, one line, where argparse would print its usage and exit."""

    def __init__(self, others: Iterable[str] = (), **options):
        """`others` are flags of another parser, whose words become the option `overrides`."""
        super().__init__(
            formatter_class=Formatter, allow_abbrev=False, print_config=None, **options
        )
        self._others = {*others}

    def parse_args(self, args: Sequence[str] | None = None, **options) -> jsonargparse.Namespace:
        own, others = words = [], []
        is_other = False
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            if flag.startswith("--"):
                is_other = flag in self._others
                # A mistyped flag is said before the one that is missing for it.
                if not is_other and flag not in self._option_string_actions:
                    self.error(f"unrecognized arguments: {flag}")
            words[is_other].append(word)
        parsed = super().parse_args(own, **options)
        if self._others:
            parsed.overrides = others
        return parsed

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(explain(message, self))


def explain(message: str, parser: "Parser", name: Callable[[str], str] = "--{}".format) -> str:
    """argparse's or jsonargparse's message as one line: which flag, what it asks for, what it got.

    Args:
        name: how a key is called.
    """
    message = " ".join(message.split())
    if required := re.search(r"arguments are required: (.+)", message):
        positional = {action.dest: action.metavar for action in parser._get_positional_actions()}
        names = (key.strip("-_") for key in required[1].split(", "))
        return "give " + ", ".join(positional.get(key, f"--{key}") for key in names)
    if unknown := re.search(r"unrecognized arguments: (.+)", message):
        known = [*parser._option_string_actions, *parser._others]
        return f"unknown: {unknown[1]} " + nearest(unknown[1].split()[0].split("=")[0], known)
    wrong = re.search(r'key "(?P<key>[\w.]+)": (?P<why>.+)', message) or re.search(
        r"argument (?:-\w/)?(?:--)?(?P<key>[\w.]+)\S*: (?P<why>.+)", message
    )
    if not wrong:
        return message
    key, why = wrong["key"].rstrip("_"), wrong["why"]
    action = next((a for a in parser._actions if a.dest.rstrip("_") == key), None)
    if action is None or isinstance(action, jsonargparse.ActionConfigFile):
        asked = "a YAML file" if action else "a section with keys of its own"
    else:
        asked = with_article(_value_words(action))
    if re.search("expected (one|at least one) argument", why):
        return f"{name(key)} needs a value: {asked}"
    if action is None or not (action.type or hasattr(action, "_typehint")):
        return f"{name(key)}: {why}"
    return f"{name(key)}: expected {asked}{_got(why)}"


def _got(why: str) -> str:
    """The value that a message complains of."""
    found = re.search(
        r"(?:Got value|Given value): ?(.*?)$"
        r"|Not of type \w+: (\S+) (?:does not conform|not an? )|('[^']*')$",
        why,
    )
    value = next((group for group in found.groups() if group is not None), None) if found else None
    return "" if value is None else f", got {value.strip(chr(39)) or 'nothing'}"
