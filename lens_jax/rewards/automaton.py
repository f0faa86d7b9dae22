"""Regular expressions over decoded text as automata over bytes.

A tokenizer's completion is bytes before it is text: a token may hold half a character or ten. So a
pattern is compiled, once and on the host, to a deterministic automaton over characters, then over
UTF-8 bytes; `tokens` lifts it to a vocabulary.

Text is what `bytes.decode(errors="replace")` makes of the bytes. Byte strings are kept as `str`
with one code point a byte and CUT (256) for a place where something was taken out of the text:
bytes on both sides of it never join to one character.
"""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable

import numpy as np

CUT = 256
SYMBOLS = 257  # 256 bytes and CUT
SILENT = -1  # the decoder has no character to report


@dataclasses.dataclass(frozen=True)
class Chars:
    """A set of characters: those of `points`, or all others."""

    points: frozenset[str] = frozenset()
    negated: bool = False

    def __contains__(self, char: str) -> bool:
        return (char in self.points) != self.negated


@dataclasses.dataclass(frozen=True)
class Many:
    """Zero or more repetitions, greedy or lazy: that decides how long a match is, not whether."""

    body: "Pattern"


@dataclasses.dataclass(frozen=True)
class Maybe:
    """Zero or one."""

    body: "Pattern"


# A literal, a set, a repetition, or a sequence of patterns.
Pattern = str | Chars | Many | Maybe | tuple["Pattern", ...]

# Every code point that UTF-8 can spell: all but the surrogates.
_ALL = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1))))

ANY = Chars(negated=True)
NOT_NEWLINE = Chars(frozenset("\n"), negated=True)
SPACE = Chars(frozenset(re.findall(r"\s", _ALL)))
DIGIT = Chars(frozenset(re.findall(r"\d", _ALL)))


class Alphabet:
    """Characters in classes that no pattern and none of `apart` tells apart. Class 0: the rest."""

    def __init__(self, patterns: Iterable[Pattern], apart: Iterable[Chars] = ()):
        self.sets = [*dict.fromkeys(itertools.chain(*map(_sets, patterns), apart))]
        self.named = sorted(frozenset().union(*(s.points for s in self.sets)))
        rest = tuple(s.negated for s in self.sets)
        members = {char: tuple(char in s for s in self.sets) for char in self.named}
        self._signatures = [*dict.fromkeys([rest, *members.values()])]
        index = {signature: i for i, signature in enumerate(self._signatures)}
        self._classes = {char: index[signature] for char, signature in members.items()}

    def __len__(self) -> int:
        return len(self._signatures)

    def __getitem__(self, char: str) -> int:
        """The class of a character."""
        return self._classes.get(char, 0)

    def classes(self, chars: Chars) -> list[int]:
        """The classes that make up one of the sets."""
        i = self.sets.index(chars)
        return [c for c, signature in enumerate(self._signatures) if signature[i]]


@dataclasses.dataclass(frozen=True)
class Automaton:
    """Deterministic; starts in state 0. `next_state` int [S, symbols], `accepts` bool [S]."""

    next_state: np.ndarray
    accepts: np.ndarray


def compile_pattern(pattern: Pattern, alphabet: Alphabet) -> Automaton:
    """An automaton over the classes of `alphabet` for `re.match`: it stays where it has matched."""
    moves: list[list[tuple[Chars, int]]] = []  # position -> (set, position)
    free: list[list[int]] = []  # position -> positions reached without reading

    def position() -> int:
        moves.append([])
        free.append([])
        return len(moves) - 1

    def build(pattern: Pattern, start: int) -> int:
        """Adds the pattern from position `start` on; returns the position where it ends."""
        match pattern:
            case Chars():
                end = position()
                moves[start].append((pattern, end))
            case Many(body):
                loop, end = position(), position()
                free[start].append(loop)
                free[build(body, loop)].append(loop)
                free[loop].append(end)
            case Maybe(body):
                end = build(body, start)
                free[start].append(end)
            case str():
                end = build(tuple(Chars(frozenset(char)) for char in pattern), start)
            case tuple():
                end = start
                for part in pattern:
                    end = build(part, end)
        return end

    final = build(pattern, position())

    def closure(positions: Iterable[int]) -> frozenset[int]:
        reached, pending = set(), list(positions)
        while pending:
            here = pending.pop()
            if here not in reached:
                reached.add(here)
                pending += free[here]
        return frozenset(reached)

    states = {closure([0]): 0}
    rows = []
    for here in (queue := list(states)):  # grows while it is read
        targets: list[set[int]] = [set() for _ in range(len(alphabet))]
        for chars, end in itertools.chain(*(moves[p] for p in here)):
            for c in alphabet.classes(chars):
                targets[c].add(end)
        row = []
        for target in map(closure, targets):
            target = here if final in here else target
            if target not in states:
                states[target] = len(states)
                queue.append(target)
            row.append(states[target])
        rows.append(row)
    return minimize(Automaton(np.array(rows), np.array([final in state for state in states])))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """UTF-8 with errors replaced, one byte at a time; state 0: between two characters.

    A byte yields up to two characters: U+FFFD for what it broke off (`first`) and the one it
    completes (`second`), as classes of an alphabet or SILENT. All are int [D, SYMBOLS].
    """

    next_state: np.ndarray
    first: np.ndarray
    second: np.ndarray


def compile_decoder(alphabet: Alphabet) -> Decoder:
    """The decoder of an alphabet: only prefixes of characters it names are told apart."""
    named = {
        code[:i] for code in (char.encode() for char in alphabet.named) for i in range(1, len(code))
    }
    replacement = alphabet["\ufffd"]
    # A state is what was read of a character: the bytes themselves where they matter, else only
    # how many bytes are missing and the range of the next one.
    start = (b"", 0, 0, 0)
    states = {start: 0}
    next_state, first, second = [], [], []
    for prefix, missing, low, high in (queue := [start]):
        rows = ([], [], [])
        for byte in range(SYMBOLS):
            broken, whole, after = SILENT, SILENT, start
            if missing and low <= byte <= high:
                code = prefix and prefix + bytes([byte])
                if missing > 1:
                    after = (code if code in named else b"", missing - 1, 0x80, 0xBF)
                else:
                    whole = alphabet[code.decode()] if code else 0
            else:
                broken = replacement if missing else SILENT
                if byte == CUT:
                    pass
                elif byte < 0x80:
                    whole = alphabet[chr(byte)]
                elif lead := _lead(byte):
                    code = bytes([byte])
                    after = (code if code in named else b"", *lead)
                else:
                    whole = replacement
            if after not in states:
                states[after] = len(states)
                queue.append(after)
            for row, value in zip(rows, (states[after], broken, whole), strict=True):
                row.append(value)
        for table, row in zip((next_state, first, second), rows, strict=True):
            table.append(row)
    return Decoder(np.array(next_state), np.array(first), np.array(second))


def over_bytes(automaton: Automaton, decoder: Decoder) -> Automaton:
    """The same language, read as bytes."""
    silent = np.arange(len(automaton.next_state))[:, None]  # last column, so that SILENT finds it
    step = np.concatenate([automaton.next_state, silent], axis=1)
    # State (q, d) is q * D + d.
    states = np.arange(len(automaton.next_state))[:, None, None]
    after = step[step[states, decoder.first], decoder.second]
    next_state = after * len(decoder.first) + decoder.next_state
    accepts = automaton.accepts[after[..., CUT]]  # half a character at the end is U+FFFD
    return minimize(Automaton(next_state.reshape(-1, SYMBOLS), accepts.reshape(-1)))


def minimize(automaton: Automaton) -> Automaton:
    """The smallest equal automaton (Moore), states numbered as they are reached."""
    reached = np.zeros(len(automaton.accepts), bool)
    frontier = np.array([0])
    while frontier.size:
        reached[frontier] = True
        frontier = np.unique(automaton.next_state[frontier])
        frontier = frontier[~reached[frontier]]
    new_index = np.cumsum(reached) - 1
    next_state = new_index[automaton.next_state[reached]]
    accepts = automaton.accepts[reached]

    columns, _ = distinct(next_state.T)
    different = next_state[:, columns]
    block, count = np.unique(accepts, return_inverse=True)[1], 0
    while block.max() + 1 != count:
        count = block.max() + 1
        block = distinct(block[:, None], block[different])[1]
    blocks, member = np.unique(block, return_index=True)
    order = blocks[np.argsort(member)]  # the start, row 0, comes first
    rank = np.argsort(order)
    member = member[order]
    return Automaton(rank[block[next_state[member]]], accepts[member])


def distinct(*tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows equal in all tables are one kind: (a row number of each kind, the kind of each row)."""
    rows = [np.ascontiguousarray(table).view(np.uint8) for table in tables]
    rows = np.concatenate(rows, axis=1)
    rows = rows.view(np.dtype((np.void, rows.shape[1])))
    _, first, kind = np.unique(rows.reshape(-1), return_index=True, return_inverse=True)
    return first, kind.reshape(-1).astype(np.int32)


def _sets(pattern: Pattern) -> list[Chars]:
    match pattern:
        case Chars():
            return [pattern]
        case Many(body) | Maybe(body):
            return _sets(body)
        case str():
            return [Chars(frozenset(char)) for char in pattern]
        case tuple():
            return [*itertools.chain(*map(_sets, pattern))]


def _lead(byte: int) -> tuple[int, int, int] | None:
    """(bytes that follow, range of the next one) of a first byte; None if it is none."""
    if 0xC2 <= byte <= 0xDF:
        return 1, 0x80, 0xBF
    if 0xE0 <= byte <= 0xEF:  # neither overlong nor a surrogate
        return 2, 0xA0 if byte == 0xE0 else 0x80, 0x9F if byte == 0xED else 0xBF
    if 0xF0 <= byte <= 0xF4:  # neither overlong nor past U+10FFFF
        return 3, 0x90 if byte == 0xF0 else 0x80, 0x8F if byte == 0xF4 else 0xBF
    return None
