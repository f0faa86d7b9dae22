"""The box that a completion writes: found, read and compared on the device.

Three forms may stand anywhere in the text: `[a, b, c, d]`, else `(a, b, c, d)`, else
`(a, b), (c, d)`. The first match of the first form that has one is the box. An attempt can only
fail at a character that begins the next one, so one deterministic automaton a form finds the
leftmost match. Its numbers are the last four that were read.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lens_jax.rewards.automaton import (
    ANY,
    CUT,
    DIGIT,
    SILENT,
    SPACE,
    SYMBOLS,
    Alphabet,
    Automaton,
    Chars,
    Decoder,
    Many,
    Maybe,
    compile_decoder,
    compile_pattern,
)

_GAP = Many(SPACE)
_NUMBER = (Maybe("-"), DIGIT, Many(DIGIT), Maybe((".", DIGIT, Many(DIGIT))))
_PAIR = (_NUMBER, ",", _GAP, _NUMBER)
_FOUR = (_PAIR, ",", _GAP, _PAIR, _GAP)
# In order of preference.
FORMS = (
    ("[", _GAP, _FOUR, "]"),
    ("(", _GAP, _FOUR, ")"),
    ("(", _GAP, _PAIR, ")", ",", _GAP, "(", _GAP, _PAIR, ")"),
)

NOTHING = SYMBOLS  # pads byte strings
OPENERS = "[("
OTHER = "x"  # stands for characters that have no place in a box
# A number is kept as mantissa x 10^exponent; with a ninth digit the mantissa is full.
_FULL = 10**8
# What a character does to the present number: 4 bits of digit + 1, and one bit each for these.
_MINUS, _POINT, _COMMA, _FRESH = range(4, 8)
_EXACT = 10  # 10^10 is the last power of ten that float32 holds exactly


class BoxState(NamedTuple):
    """State of reading N texts; the last axis is N."""

    decoder: Int[Array, "N"]
    forms: Int[Array, "N"]  # the state of all forms' automata at once
    mantissa: Int[Array, "4 N"]  # the last four numbers, the present one last
    exponent: Int[Array, "4 N"]
    sign: Int[Array, "N"]  # of the present number
    fraction: Int[Array, "N"]  # 1 after its point
    best: Int[Array, "N"]  # the form found, len(FORMS) for none
    best_mantissa: Int[Array, "4 N"]
    best_exponent: Int[Array, "4 N"]


@dataclasses.dataclass(frozen=True)
class _Spelling:
    """Pieces as one string of codes, with what each does to an attempt at a box."""

    codes: Int[np.ndarray, "C"]
    start: Int[np.ndarray, "S"]
    length: Int[np.ndarray, "S"]
    opens: Bool[np.ndarray, "S"]
    """Holds a bracket that may open a box."""
    last: Int[np.ndarray, "S"]
    """2 if such a bracket comes after the last x, 1 if an x comes last, 0 if there is neither."""

    @classmethod
    def of(cls, codes: Int[np.ndarray, "S E"]) -> "_Spelling":
        def last(*points: int) -> np.ndarray:
            found = np.isin(codes, points)
            return np.where(found, np.arange(1, codes.shape[1] + 1), 0).max(1, initial=0)

        length = (codes != NOTHING).sum(1)
        opener, other = last(*map(ord, OPENERS)), last(ord(OTHER))
        return cls(
            codes=np.append(codes[codes != NOTHING], NOTHING).astype(np.int16),
            start=(np.cumsum(length) - length).astype(np.int32),
            length=length.astype(np.int32),
            opens=opener > 0,
            last=np.where(opener > other, 2, np.where(other > 0, 1, 0)).astype(np.int8),
        )


class BoxReader:
    """Reads boxes from texts that come as pieces of encoded bytes."""

    def __init__(self):
        values = [Chars(frozenset(c for c in DIGIT.points if _value(c) == v)) for v in range(10)]
        patterns = [(Many(ANY), form) for form in FORMS]
        alphabet = Alphabet(patterns, apart=values)
        self._decoder = _pack_decoder(compile_decoder(alphabet), silent=len(alphabet))
        self._forms = _product([compile_pattern(pattern, alphabet) for pattern in patterns])

        effect = np.zeros(len(alphabet) + 1, np.int32)
        for value in range(10):
            effect[alphabet[str(value)]] = value + 1
        for bit, char in enumerate("-.,", start=_MINUS):
            effect[alphabet[char]] = 1 << bit
        effect[[alphabet[char] for char in OPENERS + ","]] |= 1 << _FRESH
        self._effect = effect

    @staticmethod
    def encode(strings: Sequence[str]) -> np.ndarray:
        """Byte strings as int16 [len(strings), E], each shortened to one that reads the same."""
        short = [_shorten(string) for string in strings]
        codes = np.full((len(short), max(map(len, short), default=0)), NOTHING, np.int16)
        for row, string in zip(codes, short, strict=True):
            row[: len(string)] = [*map(ord, string)]
        return codes

    def _start(self, count: int) -> BoxState:
        def full(*shape: int, value: int = 0) -> Array:
            return jnp.full((*shape, count), value, jnp.int32)

        return BoxState(
            decoder=full(),
            forms=full(),
            mantissa=full(4),
            exponent=full(4),
            sign=full(value=1),
            fraction=full(),
            best=full(value=len(FORMS)),
            best_mantissa=full(4),
            best_exponent=full(4),
        )

    def find(
        self, codes: Int[np.ndarray, "S E"], pieces: Int[Array, "N T"]
    ) -> tuple[Float[Array, "N 4"], Bool[Array, "N"]]:
        """The boxes of N texts of T pieces each, zeros where there is none, and which have one.

        Bytes are read one at a time, but only those of pieces that can belong to a box: from one
        with a bracket on, to the next x. In most texts that is a small part, and the loop ends
        when the last text has been read.

        Args:
            codes: the S different pieces, as `encode` gives them.
            pieces: which of them each text consists of.
        """
        spelling = _Spelling.of(codes)
        count, steps = pieces.shape
        mark = jnp.asarray(spelling.last)[pieces]
        # Whether the last bracket or x before a piece is a bracket.
        place = 2 * jnp.arange(1, steps + 1, dtype=jnp.int32)
        last = lax.cummax(jnp.where(mark > 0, place + mark - 1, 0), axis=1)
        within = jnp.pad(last[:, :-1] % 2 == 1, ((0, 0), (1, 0)))
        read = (within & jnp.asarray(spelling.length > 0)[pieces]) | jnp.asarray(spelling.opens)[
            pieces
        ]
        following = next_place(read)
        pieces = jnp.pad(pieces, ((0, 0), (0, 1)))
        start, length, flat = map(jnp.asarray, (spelling.start, spelling.length, spelling.codes))

        def piece(place):
            index = at(pieces, place)
            return start[index], start[index] + length[index]

        def unfinished(carry):
            return jnp.any(carry[0] < steps)

        def step(carry):
            place, here, end, state = carry
            state = self._read(state, jnp.where(place < steps, flat[here], NOTHING))
            over = here + 1 >= end
            place = jnp.where(over, at(following, place + 1), place)
            first, last = piece(place)
            return place, jnp.where(over, first, here + 1), jnp.where(over, last, end), state

        place = following[:, 0]
        return self._finish(
            lax.while_loop(unfinished, step, (place, *piece(place), self._start(count)))[3]
        )

    def _read(self, state: BoxState, code: Int[Array, "N"]) -> BoxState:
        decoded = jnp.asarray(self._decoder)[state.decoder, code]
        first, second = decoded >> 8 & 255, decoded & 255
        forms = jnp.asarray(self._forms)
        reached = forms[forms[state.forms, first] >> 2, second]
        form, effect = reached & 3, jnp.asarray(self._effect)[second]
        now = form < state.best
        best_mantissa = jnp.where(now, state.mantissa, state.best_mantissa)
        best_exponent = jnp.where(now, state.exponent, state.best_exponent)

        # A digit beyond the ninth only moves the point.
        digit = (effect & 15) - 1
        present, scale = state.mantissa[3], state.exponent[3]
        full = jnp.abs(present) >= _FULL
        present = jnp.where((digit < 0) | full, present, 10 * present + state.sign * digit)
        scale = jnp.where(digit < 0, scale, scale + full - state.fraction)
        minus, point, comma, fresh = (effect >> bit & 1 == 1 for bit in range(_MINUS, _FRESH + 1))
        return BoxState(
            decoder=decoded >> 16,
            forms=reached >> 2,
            mantissa=_append(state.mantissa, present, comma, fresh),
            exponent=_append(state.exponent, scale, comma, fresh),
            sign=jnp.where(fresh, 1, jnp.where(minus, -1, state.sign)),
            fraction=jnp.where(fresh, 0, jnp.where(point, 1, state.fraction)),
            best=jnp.minimum(state.best, form),
            best_mantissa=best_mantissa,
            best_exponent=best_exponent,
        )

    def _finish(self, state: BoxState) -> tuple[Float[Array, "N 4"], Bool[Array, "N"]]:
        found = state.best < len(FORMS)
        values = _decimal(state.best_mantissa, state.best_exponent)
        return jnp.where(found, values, 0.0).T, found


def _pack_decoder(decoder: Decoder, silent: int) -> Int[np.ndarray, "D C"]:
    """Next state, first and second character (`silent` for none) of each state and code, packed."""
    states = np.arange(len(decoder.next_state))[:, None]
    quiet = np.full_like(states, silent)

    def table(columns: np.ndarray, nothing: np.ndarray) -> np.ndarray:
        return np.concatenate([np.where(columns == SILENT, silent, columns), nothing], axis=1)

    first, second = table(decoder.first, quiet), table(decoder.second, quiet)
    packed = table(decoder.next_state, states) << 16 | first << 8 | second
    return packed.astype(np.int32)


def _product(forms: Sequence[Automaton]) -> Int[np.ndarray, "S C"]:
    """All forms as one automaton, silence its last class.

    An entry is 4 x the next state + the first form that is then complete, 3 for none.
    """
    steps = [
        np.concatenate([form.next_state, np.arange(len(form.accepts))[:, None]], axis=1)
        for form in forms
    ]
    start = (0,) * len(forms)
    places, rows = {start: 0}, []
    for states in (queue := [start]):
        reached = [step[state] for step, state in zip(steps, states, strict=True)]
        complete = np.full(reached[0].shape, len(forms))
        for i in reversed(range(len(forms))):
            complete[forms[i].accepts[reached[i]]] = i
        for place in (tuples := [*map(tuple, np.stack(reached, axis=1).tolist())]):
            if place not in places:
                places[place] = len(places)
                queue.append(place)
        rows.append(4 * np.array([places[place] for place in tuples]) + complete)
    return np.array(rows, np.int32)


def box_iou(a: Float[Array, "*N 4"], b: Float[Array, "*N 4"]) -> Float[Array, "*N"]:
    """IoU of xyxy boxes in float32; 0 where the union is 0 or a box is not finite."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    upper, lower = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = jnp.prod(jnp.maximum(lower - upper, 0.0), axis=-1)
    area_a, area_b = (jnp.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (a, b))
    union = area_a + area_b - intersection
    defined = (union != 0) & jnp.isfinite(union) & jnp.isfinite(intersection)
    return jnp.where(defined, intersection / jnp.where(defined, union, 1.0), 0.0)


def at(table: Array, place: Int[Array, "N"]) -> Array:
    """The element of every row [N, T] at its place; the last one for places beyond."""
    index = jnp.minimum(place, table.shape[1] - 1)
    return jnp.take_along_axis(table, index[:, None], axis=1)[:, 0]


def next_place(chosen: Bool[Array, "N T"]) -> Int[Array, "N T+1"]:
    """The first chosen place from each one on, T if there is none."""
    steps = chosen.shape[1]
    places = jnp.where(chosen, jnp.arange(steps, dtype=jnp.int32), steps)
    following = lax.cummin(places, axis=1, reverse=True)
    return jnp.pad(following, ((0, 0), (0, 1)), constant_values=steps)


def _append(numbers: Array, present: Array, comma: Array, fresh: Array) -> Array:
    """Puts the present number [N] into [4, N]; a comma moves it back, a fresh one is 0."""
    earlier = jnp.where(comma, jnp.stack([*numbers[1:3], present]), numbers[:3])
    return jnp.concatenate([earlier, jnp.where(fresh, 0, present)[None]])


def _decimal(mantissa: Int[Array, "*N"], exponent: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """mantissa x 10^exponent in float32: the nearest to 7 digits and 10 decimals, 1e-6 beyond.

    Without trailing zeros 7 digits are a float32 integer, and one division or product by an exact
    power of ten rounds once.
    """

    def trim(_, number):
        mantissa, exponent = number
        zero = mantissa % 10 == 0
        return jnp.where(zero, mantissa // 10, mantissa), exponent + zero

    mantissa, exponent = jax.lax.fori_loop(0, 9, trim, (mantissa, exponent))
    with np.errstate(over="ignore"):
        power = jnp.asarray((10.0 ** np.arange(60)).astype(np.float32))  # 1e39 and up: infinite
    exact = jnp.clip(exponent, -_EXACT, _EXACT)
    rest = exponent - exact
    value = mantissa.astype(jnp.float32)
    value = jnp.where(exact < 0, value / power[jnp.abs(exact)], value * power[jnp.abs(exact)])
    scale = power[jnp.minimum(jnp.abs(rest), len(power) - 1)]
    value = jnp.where(rest < 0, value / scale, value * scale)
    return jnp.where(mantissa == 0, 0.0, value)  # not 0 x infinity


def _value(char: str) -> int:
    return unicodedata.decimal(char)


class _Letters(dict):
    """A character's letter in a shortened string, for str.translate."""

    def __missing__(self, point: int) -> str:
        return chr(point - 0xDC00) if 0xDC80 <= point <= 0xDCFF else OTHER


_LETTERS = _Letters(
    {ord(c): " " for c in SPACE.points}
    | {ord(c): str(_value(c)) for c in DIGIT.points}
    | {ord(c): c for c in "-.,[]()"}
)


def _shorten(string: str) -> str:
    """A shorter byte string that no reader of boxes can tell from this one.

    Whole characters become one byte, x where they have no place in a box; bytes that may belong to
    a character cut in two stay. An x ends every attempt: what stands before it matters only if it
    may close a box, what stands after it only from the next bracket on.
    """
    pieces = (piece.encode("latin-1") for piece in string.split(chr(CUT)))
    decoded = (piece.decode("utf-8", "surrogateescape").translate(_LETTERS) for piece in pieces)
    short = re.sub(" +", " ", chr(CUT).join(decoded))
    return re.sub(r"x[^\[(]*", "x", re.sub(r"[^\])]*x", "x", short))
