"""Keys of configuration files, with their types, and tables that map them to fields of ours."""

import sys
from collections.abc import Mapping
from typing import Any


class TypedKeys(dict[str, Any]):
    """Keys of a configuration file, read with their types; `owner` is who needs them."""

    def __init__(self, values: Mapping[str, Any], owner: str):
        super().__init__(values)
        self.owner = owner

    def _value(self, key: str) -> Any:
        if key not in self:
            raise ValueError(f"no key '{key}', which {self.owner} needs")
        return self[key]

    def whole(self, key: str) -> int:
        """A positive whole number."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: expected a positive whole number, found {value!r}")
        return value

    def number(self, key: str) -> float:
        """A positive number, not infinite."""
        value = self._value(key)
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_real or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{key}: expected a positive number, found {value!r}")
        return float(value)

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, 0 allowed."""
        value = self._value(key)
        if not isinstance(value, list | tuple) or not all(
            isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value
        ):
            raise ValueError(f"{key}: expected a list of whole numbers, found {value!r}")
        return tuple(value)


# TypedKeys (a path of keys, joined by dots) -> key -> field; several keys may stand for one field.
FieldTable = Mapping[str, Mapping[str, str]]


def read_sections(
    config: Mapping[str, Any],
    fields: FieldTable,
    fixed: Mapping[str, Mapping[str, Any]],
    defaults: object | None,
) -> dict[str, Any]:
    """Fields of a dataclass from the nested sections of a configuration file.

    Args:
      config: the file's content. A key that is null counts as left out.
      fields: which key gives which field.
      fixed: section -> key -> the only value this port has.
      defaults: an object with the values of fields that no key gives; None: every key is needed.

    Raises:
      ValueError: on a value that this port does not have, or two that contradict each other.
      KeyError: on a missing key that is needed.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for section, keys in fields.items():
        values: Any = config
        for key in filter(None, section.split(".")):
            values = values[key] if defaults is None else values.get(key) or {}
        prefix = f"{section}." if section else ""
        values = {key: value for key, value in values.items() if value is not None}
        for key, expected in fixed.get(section, {}).items():
            if values.get(key, expected) != expected:
                raise ValueError(f"{prefix}{key} = {values[key]} is not supported, only {expected}")
        for key, field in keys.items():
            if key not in values:
                if defaults is None:
                    raise KeyError(key)
                continue
            value = tuple(values[key]) if isinstance(values[key], list) else values[key]
            if found.setdefault(field, value) != value:
                raise ValueError(
                    f"{prefix}{key} = {value} contradicts {said[field]} = {found[field]}"
                )
            said.setdefault(field, f"{prefix}{key}")
    for keys in fields.values():
        found |= {field: getattr(defaults, field) for field in keys.values() if field not in found}
    return found


def write_sections(
    config: object, fields: FieldTable, more: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The nested sections that `read_sections` reads, with `more` keys in some of them."""
    result: dict[str, Any] = {}
    for section in dict.fromkeys((*fields, *more)):
        level = result
        for key in filter(None, section.split(".")):
            level = level.setdefault(key, {})
        for key, field in fields.get(section, {}).items():
            value = getattr(config, field)
            level[key] = list(value) if isinstance(value, tuple) else value
        level |= more.get(section, {})
    return result


def check_derived(values: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    """Raises ValueError where a file says of `derived`, keys that follow from others, otherwise.

    Args:
      values: the file's content.
      derived: path of keys, joined by dots -> what follows from the rest of the file.
    """
    for path, expected in derived.items():
        value: Any = values
        for key in path.split("."):
            value = None if value is None else value.get(key)
        if value is not None and value != expected:
            raise ValueError(f"{path} = {value}, but the rest of the file asks for {expected}")
