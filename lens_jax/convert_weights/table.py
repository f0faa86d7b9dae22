"""Weight tables: which official tensor becomes which parameter, and how its axes move.

A family (Qwen-VL, SAM 2, context module) has one `Table`. Every `Transform` knows its inverse, so
the same table serves both directions. Targets are on-disk names, one tensor and layer each:
`language/layers/0/q_proj/kernel`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lens_jax.checkpoints import arrays
from lens_jax.files import CheckpointError

Shape = tuple[int, ...]
UNUSED = "unused/"


class WeightsError(CheckpointError):
    """Everything that is wrong with a set of tensors, one line each."""

    def __init__(self, *errors: str):
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Transform:
    """A bijection between PyTorch's layout of a tensor and ours; values are never touched."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def __repr__(self) -> str:
        return self.name

    def target_shape(self, source: Shape) -> Shape | None:
        """The shape after `forward`, None if a tensor of shape `source` does not fit."""
        return _shape_of(self.forward, source)

    def source_shape(self, target: Shape) -> Shape | None:
        """The shape after `inverse`, None if a tensor of shape `target` does not fit."""
        return _shape_of(self.inverse, target)


def _shape_of(function: Callable[[np.ndarray], np.ndarray], shape: Shape) -> Shape | None:
    # All strides are zero, so neither transposing nor reshaping allocates anything.
    try:
        return function(np.broadcast_to(np.uint8(0), shape)).shape
    except ValueError:
        return None


def _permutation(name: str, axes: Shape) -> Transform:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(name, lambda x: x.transpose(axes), lambda x: x.transpose(back))


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = _permutation("linear (out, in) -> (in, out)", (1, 0))
CONV1D = _permutation("conv1d (out, in, k) -> (k, in, out)", (2, 1, 0))
CONV2D = _permutation("conv2d (out, in, h, w) -> (h, w, in, out)", (2, 3, 1, 0))
CONV_TRANSPOSE2D = _permutation("conv_transpose2d (in, out, h, w) -> (h, w, in, out)", (2, 3, 0, 1))
CHANNELS_LAST = _permutation("feature map (n, c, h, w) -> (n, h, w, c)", (0, 2, 3, 1))
SQUEEZE = Transform("squeeze (1, ...) -> (...)", lambda x: x.squeeze(0), lambda x: x[None])


def chain(first: Transform, *rest: Transform) -> Transform:
    """The transforms one after another, e.g. `chain(CHANNELS_LAST, SQUEEZE)`."""
    for then in rest:
        first = Transform(
            f"{first.name}, then {then.name}",
            lambda x, f=first.forward, g=then.forward: g(f(x)),
            lambda x, f=first.inverse, g=then.inverse: f(g(x)),
        )
    return first


def flattened_conv(*window: int) -> Transform:
    """A convolution whose stride is its window, as a linear layer over flattened patches.

    (out, *window) -> (prod(window), out), e.g. Qwen's patch embedding with window (3, 2, 14, 14).
    """

    def forward(x: np.ndarray) -> np.ndarray:
        if x.shape[1:] != window:
            raise ValueError(f"expected (out, {', '.join(map(str, window))}), got {x.shape}")
        return x.reshape(len(x), -1).transpose()

    return Transform(
        f"flattened conv (out, {', '.join(map(str, window))}) -> (in, out)",
        forward,
        lambda x: x.transpose().reshape(x.shape[1], *window),
    )


@dataclass(frozen=True)
class Entry:
    """One tensor: its official name, its name on our disk, and the change of layout."""

    source: str
    target: str
    transform: Transform = IDENTITY


@dataclass(frozen=True)
class Table:
    """All tensors of a family.

    `carried` are regular expressions (matched in full) for official tensors that the model never
    uses; they are kept under `unused/` so that an export is complete. `junk` matches what is listed
    and dropped.
    """

    entries: tuple[Entry, ...]
    carried: tuple[str, ...] = ()
    junk: tuple[str, ...] = ()

    def __add__(self, other: "Table") -> "Table":
        return Table(
            self.entries + other.entries, self.carried + other.carried, self.junk + other.junk
        )

    def with_prefix(self, prefix: str) -> "Table":
        """The same table for a checkpoint that puts `prefix` before every official name."""
        return Table(
            tuple(replace(entry, source=prefix + entry.source) for entry in self.entries),
            tuple(f"{re.escape(prefix)}(?:{pattern})" for pattern in self.carried),
            tuple(f"{re.escape(prefix)}(?:{pattern})" for pattern in self.junk),
        )


def carried_entry(source: str) -> Entry:
    """An official tensor that is only carried along; the name is invertible."""
    return Entry(source, UNUSED + source.replace(".", "/"))


@dataclass(frozen=True)
class Plan:
    """A conversion to be done: `entries` in the order of the source; `junk` is dropped."""

    entries: tuple[Entry, ...]
    junk: tuple[str, ...]


def make_plan(
    table: Table, sources: Mapping[str, Shape], expected: Mapping[str, Shape], where: str
) -> Plan:
    """Matches official tensors against a table and the model's own shapes.

    Args:
      sources: official name -> shape, as found in the checkpoint.
      expected: on-disk name -> shape, of the parameters these tensors must fill.
      where: the file or directory, named in messages.

    Raises:
      WeightsError: every missing, unexpected and misshapen tensor at once.
    """
    by_source = {entry.source: entry for entry in table.entries}
    targets = {entry.target for entry in table.entries}
    if len(targets) < len(table.entries) or targets != set(expected):
        raise AssertionError(
            "the weight table does not match the model: "
            f"only in the table {sorted(targets - set(expected))}, "
            f"only in the model {sorted(set(expected) - targets)}"
        )
    errors, entries, junk, unexpected = [], [], [], []
    for name, shape in sources.items():
        if entry := by_source.get(name):
            want = expected[entry.target]
            if entry.transform.target_shape(shape) != want:
                official = entry.transform.source_shape(want)
                errors.append(
                    f"{where}: misshapen tensor {name}: shape {list(shape)}, "
                    f"the configuration asks for {list(official or want)}"
                )
            entries.append(entry)
        elif any(re.fullmatch(pattern, name) for pattern in table.junk):
            junk.append(name)
        elif any(re.fullmatch(pattern, name) for pattern in table.carried):
            entries.append(carried_entry(name))
        else:
            unexpected.append(name)
    missing = [name for name in by_source if name not in sources]
    if max(len(missing), len(unexpected)) > _LISTED:
        meaning, covers_all = _meaning(missing, unexpected, sources)
        errors = [f"{where}: {_summary(missing, unexpected)}: {meaning}", *errors]
        if not covers_all:
            errors += _patterns(where, "unexpected", unexpected)
            errors += _patterns(where, "missing", missing)
    else:
        errors += [
            f"{where}: unexpected tensor {name} with shape {list(sources[name])}"
            for name in unexpected
        ]
        errors += [f"{where}: missing tensor {name}" for name in missing]
    if errors:
        raise WeightsError(*errors)
    return Plan(tuple(entries), tuple(junk))


_LISTED = 20  # more missing or unexpected tensors than this are told by pattern


def _patterns(where: str, kind: str, names: Iterable[str]) -> list[str]:
    """A line for each pattern of names, numbers as *, that covers at least one."""
    groups: dict[str, list[str]] = {}
    for name in names:
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern, []).append(name)
    return [
        f"{where}: {kind} tensor {members[0]}"
        if len(members) == 1
        else f"{where}: {len(members)} {kind} tensors {pattern}"
        for pattern, members in groups.items()
    ]


def _summary(missing: list[str], unexpected: list[str]) -> str:
    """How many tensors are missing and unexpected, with examples."""
    told = [
        f"{len(names)} tensors are {kind} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    return " and ".join(told)


def _meaning(missing: list[str], unexpected: list[str], sources: Iterable[str]) -> tuple[str, bool]:
    """The usual meaning of such names, and whether it covers every single one."""
    wanted, strange = set(missing), set(unexpected)
    for what, longer, shorter in (
        ("carry", strange, wanted),
        ("lack", wanted, strange),
    ):
        counts = Counter(
            prefix
            for name in longer
            for prefix in _prefixes(name)
            if name.removeprefix(prefix) in shorter
        )
        if counts:
            [(prefix, count)] = counts.most_common(1)
            if 2 * count > min(len(longer), len(shorter)):
                return (
                    f"{count} names {what} the prefix {prefix}, as of another class that holds or "
                    "is held by this model; save the model itself"
                ), count == len(wanted) == len(strange)
    tops = {name.partition(".")[0] for name in missing}
    if missing and not tops & {name.partition(".")[0] for name in sources}:
        return (
            f"nothing of {' and '.join(f'{top}.*' for top in sorted(tops))} is there, so this is "
            "another kind of model or a part of one"
        ), not unexpected
    if not unexpected:
        return "the files are incomplete, or the configuration is that of another model", False
    return "these are the weights of another model, or their configuration is", False


def _prefixes(name: str) -> list[str]:
    """`a.b.c` -> `a.`, `a.b.`"""
    parts = name.split(".")
    return [".".join(parts[:n]) + "." for n in range(1, len(parts))]


def params_from(table: Table, tensors: Mapping[str, np.ndarray], prefix: str = "") -> dict:
    """Official tensors in memory as nested parameters, without the table's first folder."""
    return arrays.nest(
        {
            entry.target.partition("/")[2]: entry.transform.forward(tensors[prefix + entry.source])
            for entry in table.entries
        }
    )


def tensors_from(table: Table, params: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `params_from`."""
    flat = arrays.flatten(params)
    ours = ((entry, np.asarray(flat[entry.target.partition("/")[2]])) for entry in table.entries)
    return {e.source: np.ascontiguousarray(e.transform.inverse(x)) for e, x in ours}
