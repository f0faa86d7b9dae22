"""Reads what XLA compiled: loops, collectives, and bytes to and from memory.

The input is scheduled HLO text, `compiled.as_text()`. XLA's own cost analysis counts a loop's body
once and a fusion's operands whole; here a body counts as often as it runs, and of an operand that
is only sliced the slice.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COLLECTIVES = frozenset(
    [
        "all-gather",
        "all-reduce",
        "all-to-all",
        "collective-broadcast",
        "collective-permute",
        "ragged-all-to-all",
        "reduce-scatter",
    ]
)
# Operations that move nothing: names, views, calls, and the ends of transfers that have begun.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "iota",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "conditional",
        "while",
        "call",
        "copy-done",
        "slice-done",
        "async-done",
        "async-update",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "send-done",
        "recv-done",
    ]
)
_NO_ESTIMATE = 10**12
_VIEWS = frozenset(["bitcast", "reshape", "copy", "convert", "transpose"])
_SLICES = frozenset(["slice", "dynamic-slice", "gather"])

_HEADING = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_LINE = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)"
    r"\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"(?P<type>[a-z]\w*)\[(?P<sizes>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    text: str

    def called(self, key: str) -> str | None:
        """The computation an attribute names: `body`, `condition`, `calls`, `to_apply`."""
        found = re.search(rf"\b{key}=%?([\w.-]+)", self.text)
        return found[1] if found else None


class Module:
    """A compiled program: its computations, each a dict of instructions in order."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
            if heading := _HEADING.match(line):
                name = heading["name"]
                self.computations[name] = {}
                if heading["entry"]:
                    self.entry = name
            elif found := _LINE.match(line):
                operands = tuple(re.findall(r"%([\w.-]+)", found["operands"]))
                instruction = Instruction(
                    found["name"], found["op"], found["shape"], operands, line
                )
                self.computations[name][found["name"]] = instruction
                if found["root"]:
                    self._roots[name] = instruction

    def instructions(self, computation: str | None = None) -> Iterator[Instruction]:
        """Instructions of a computation (the entry) and all it calls: loops, fusions, branches."""
        for instruction in self.computations[computation or self.entry].values():
            yield instruction
            called = re.findall(_CALLED.pattern + r"([\w.-]+)", instruction.text)
            for names in re.findall(r"_computations=\{(.*?)\}", instruction.text):
                called += re.findall(r"[\w.-]+", names)
            for name in called:
                yield from self.instructions(name)

    def loops(self, computation: str | None = None) -> list[Instruction]:
        """The `while` instructions of a computation (the entry) itself, in order."""
        body = self.computations[computation or self.entry].values()
        return [instruction for instruction in body if instruction.op == "while"]

    def collectives(self, computation: str | None = None) -> list[Instruction]:
        """Every collective that running a computation (the entry) may start."""
        return [
            instruction
            for instruction in self.instructions(computation)
            if instruction.op.removesuffix("-start") in COLLECTIVES
        ]

    def trips(self, loop: Instruction) -> int | None:
        """How often a loop that counts from 0 runs; None where the data decide."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = loop.called("condition")
        root = self._roots[condition]
        if root.op != "compare" or "direction=LT" not in root.text:
            return None
        limits = [self.computations[condition][name].text for name in root.operands]
        constants = [found[1] for x in limits if (found := re.search(r" constant\((\d+)\)", x))]
        return int(constants[0]) if len(constants) == 1 else None

    def traffic(self, computation: str | None = None, *, unknown_trips: int = 1) -> int:
        """Bytes read from and written to main memory by one run of a computation (the entry).

        What the compiler keeps in fast memory, as layouts with `S(n)` say, is free. A loop counts
        as often as it runs, one of unknown length `unknown_trips` times.
        """
        return sum(
            times * self._moved(body, instruction)
            for body, instruction, times in self._runs(computation, unknown_trips)
            if instruction.op not in _FREE
        )

    def cycles(self, computation: str | None = None, *, unknown_trips: int = 1) -> int:
        """Cycles that the compiler estimates for one run of a computation (the entry).

        Only TPU programs carry estimates, and kernels and collectives none.
        """
        total = 0
        for _, instruction, times in self._runs(computation, unknown_trips):
            found = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
            if found and int(found[1]) < _NO_ESTIMATE:
                total += times * int(found[1])
        return total

    def collective_bytes(
        self, computation: str | None = None, *, unknown_trips: int = 1
    ) -> dict[str, int]:
        """Bytes that a device receives in the collectives of one run, by kind.

        A collective that is cut into several steps, which share its channel, counts once. Its
        result counts whole, its own part included, and so does what a reduce-scatter sums; an
        all-reduce twice: its parts are summed, then spread. What comes from other slices, over the
        network of the hosts, is `between slices`.
        """
        total: dict[str, int] = {}
        for body, times in self._bodies(computation or self.entry, unknown_trips):
            seen = set()
            for instruction in self._straight(body):
                kind = instruction.op.removesuffix("-start")
                if kind == "recv" and "megascale" in instruction.text:
                    kind = "between slices"
                elif kind not in COLLECTIVES or instruction.name in self._continued:
                    continue
                elif instruction.name in self._scattered:
                    kind = "reduce-scatter"
                channel = re.search(r"channel_id=(\d+)", instruction.text)
                alone = kind == "reduce-scatter" or instruction.name in self._started
                key = kind, channel[1] if channel and not alone else instruction.name
                if key in seen:
                    continue
                seen.add(key)
                size = self._received(instruction, kind)
                total[kind] = total.get(kind, 0) + times * size
        return total

    def _received(self, instruction: Instruction, kind: str) -> int:
        operands = sum(whole(self._named[name].shape) for name in instruction.operands)
        if kind in ("all-reduce", "reduce-scatter"):
            return operands * (2 if kind == "all-reduce" else 1)
        if kind == "all-gather":  # what is started names its operands again
            return whole(instruction.shape) - operands * instruction.op.endswith("-start")
        return max(whole(part[0]) for part in _ARRAY.finditer(instruction.shape))

    @functools.cached_property
    def _named(self) -> dict[str, Instruction]:
        return {k: v for inside in self.computations.values() for k, v in inside.items()}

    @functools.cached_property
    def _started(self) -> set[str]:
        """Collectives that a fusion starts; on TPU such ones may all have one channel."""
        return {
            instruction.name
            for inside in self.computations.values()
            if any('"AsyncCollectiveStart"' in x.text for x in inside.values())
            for instruction in inside.values()
        }

    @functools.cached_property
    def _continued(self) -> set[str]:
        """The same collectives in the fusions that carry them on beside other work or end them."""
        return {
            instruction.name
            for name, inside in self.computations.items()
            if name.startswith("async_collective_fusion")
            or any('"AsyncCollectiveDone"' in x.text for x in inside.values())
            for instruction in inside.values()
        }

    @functools.cached_property
    def _scattered(self) -> set[str]:
        """All-reduces of which a device keeps its part alone: TPU's way to write a reduce-scatter.

        The fusion around them runs as one ring of sums.
        """
        return {
            instruction.name
            for inside in self.computations.values()
            for instruction in inside.values()
            if instruction.op == "all-reduce"
            and (users := list(_users(inside, instruction.name)))
            and all(user.op == "dynamic-slice" for user in users)
        }

    def _bodies(self, computation: str, unknown_trips: int) -> Iterator[tuple[str, int]]:
        """A computation, those it calls and the bodies of its loops, with how often each runs."""
        yield computation, 1
        for instruction in self._straight(computation):
            times = 1
            if instruction.op == "while":
                trips = self.trips(instruction)
                times = unknown_trips if trips is None else trips
            elif instruction.op != "call":
                continue
            called = instruction.called("body") or instruction.called("to_apply")
            for body, inner in self._bodies(called, unknown_trips):
                yield body, times * inner

    def _straight(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation and of its fusions, sums and branches."""
        for instruction in self.computations[computation].values():
            yield instruction
            if instruction.op not in ("while", "call"):
                for key in ("calls", "to_apply", "true_computation", "false_computation"):
                    if (name := instruction.called(key)) and name in self.computations:
                        yield from self._straight(name)

    def _runs(
        self, computation: str | None, unknown_trips: int
    ) -> Iterator[tuple[str, Instruction, int]]:
        """The instructions of `_bodies`, each with its body and how often it runs."""
        for body, times in self._bodies(computation or self.entry, unknown_trips):
            for instruction in self.computations[body].values():
                yield body, instruction, times

    def _moved(self, computation: str, instruction: Instruction) -> int:
        """Bytes that one instruction reads and writes."""
        shapes = [self.computations[computation][name].shape for name in instruction.operands]
        written = main_memory(instruction.shape)
        if instruction.op == "copy-start":  # (destination, source, context)
            return sum(size for size in _sizes(instruction.shape)[:2])
        if fused := instruction.called("calls"):
            read = sum(self._read(fused, i, shape) for i, shape in enumerate(shapes))
            return read + self._written(fused, self._roots[fused], instruction.shape)
        if instruction.op in _SLICES:
            return min(main_memory(shapes[0]), whole(instruction.shape)) + written
        if instruction.op == "dynamic-update-slice":
            return main_memory(shapes[1]) + min(written, whole(shapes[1]))
        return sum(map(main_memory, shapes)) + written

    def _read(self, fused: str, index: int, shape: str) -> int:
        """Bytes that a fusion reads of its operand number `index`."""
        limit = main_memory(shape)
        parameter = next(
            (
                instruction
                for instruction in self.computations[fused].values()
                if instruction.op == "parameter" and f" parameter({index})" in instruction.text
            ),
            None,
        )
        if not limit or parameter is None:
            return 0
        return min(limit, self._used(fused, parameter.name, limit))

    def _used(self, fused: str, name: str, limit: int) -> int:
        total = 0
        for user in self.computations[fused].values():
            if name not in user.operands:
                continue
            first = user.operands[0] == name
            if user.op in _SLICES and first:
                total += whole(user.shape)
            elif user.op in _VIEWS and user is not self._roots[fused]:
                total += self._used(fused, user.name, limit)
            elif nested := user.called("calls"):
                total += sum(
                    self._read(nested, i, re.sub(r"S\(\d+\)", "", user_shape))
                    for i, operand in enumerate(user.operands)
                    if operand == name
                    for user_shape in [self.computations[fused][name].shape]
                )
            elif not (user.op == "dynamic-update-slice" and first):  # updated in place
                return limit
        return total

    def _written(self, fused: str, root: Instruction, shape: str) -> int:
        """Bytes that a fusion writes: of an operand updated in place, the update."""
        if not main_memory(shape):
            return 0
        inside = self.computations[fused]
        if root.op == "tuple":
            return sum(
                self._written(fused, inside[name], part[0])
                for name, part in zip(root.operands, _ARRAY.finditer(shape), strict=True)
            )
        while root.op in _VIEWS:
            root = inside[root.operands[0]]
        if root.op == "dynamic-update-slice":
            return whole(inside[root.operands[1]].shape)
        if (nested := root.called("calls")) and root.op == "fusion":
            return self._written(nested, self._roots[nested], shape)
        return main_memory(shape)


def _users(inside: dict[str, Instruction], name: str) -> Iterator[Instruction]:
    """The instructions that read an instruction's result, or one of its members."""
    for user in inside.values():
        if name in user.operands:
            if user.op in ("get-tuple-element", "bitcast"):
                yield from _users(inside, user.name)
            else:
                yield user


def whole(shape: str) -> int:
    """Bytes of a shape as HLO writes it, tuples included, wherever they lie."""
    return sum(_sizes(re.sub(r"S\(\d+\)", "", shape)))


def main_memory(shape: str) -> int:
    """Bytes of a shape that lie in main memory."""
    return sum(_sizes(shape))


def _sizes(shape: str) -> list[int]:
    """Bytes in main memory of each array of a shape."""
    sizes = []
    for array in _ARRAY.finditer(shape):
        fast = re.search(r"S\([1-9]\d*\)", array["layout"] or "")
        count = math.prod(int(n) for n in array["sizes"].split(",") if n)
        sizes.append(0 if fast else count * _bits(array["type"]) // 8)
    return sizes


def _bits(name: str) -> int:
    """Bits of an element type: bf16, f8e4m3fn, s32, pred, ..."""
    if name in ("token", "opaque"):
        return 0
    if name == "pred":
        return 8
    return int(re.match(r"[a-z]+(\d+)", name)[1]) * (2 if name[0] == "c" else 1)
