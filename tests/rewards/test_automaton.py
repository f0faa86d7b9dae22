"""Each stage from pattern to tokens, against Python on all short or many random inputs."""

import itertools
import random
import re

import numpy as np
import pytest

from lens_jax.rewards.automaton import (
    ANY,
    CUT,
    DIGIT,
    NOT_NEWLINE,
    SILENT,
    SPACE,
    Alphabet,
    Chars,
    Many,
    Maybe,
    compile_decoder,
    compile_pattern,
    distinct,
    over_bytes,
)
from lens_jax.rewards.tokens import compile_removal, lift, small

PATTERNS = [
    ("ab", r"ab"),
    (("a", Many("b"), "a"), r"ab*a"),
    (("<", Many(ANY), ">", Many(SPACE), "a"), r"(?s)<.*?>\s*a"),
    (("<", Many(NOT_NEWLINE), ">"), r"<.*?>"),
    ((Maybe("-"), DIGIT, Many(DIGIT), Maybe((".", DIGIT)), "a"), r"-?\d+(\.\d)?a"),
    ((Many((Maybe("a"), "b")), Chars(frozenset("<"), negated=True)), r"(a?b)*[^<]"),
    ((Many(ANY), Maybe(Many("a")), "bb"), r"(?s).*(a*)?bb"),
]


def run(automaton, symbols) -> int:
    state = 0
    for symbol in symbols:
        state = automaton.next_state[state, symbol]
    return state


@pytest.mark.parametrize(("pattern", "regex"), PATTERNS)
def test_patterns_are_re_match_on_characters(pattern, regex):
    alphabet = Alphabet([pattern])
    automaton = compile_pattern(pattern, alphabet)
    for length in range(6):
        for text in map(
            "".join, itertools.product("ab<> \n1.-"[: 9 if length < 5 else 5], repeat=length)
        ):
            state = run(automaton, [alphabet[char] for char in text])
            assert automaton.accepts[state] == bool(re.match(regex, text)), text


@pytest.mark.parametrize(("pattern", "regex"), PATTERNS)
def test_patterns_are_re_match_on_bytes(pattern, regex):
    alphabet = Alphabet([pattern])
    automaton = over_bytes(compile_pattern(pattern, alphabet), compile_decoder(alphabet))
    rng = random.Random(0)
    pieces = [
        *(c.encode() for c in "aab<> \n1.-\u3000\u2028\x85\x1c٣５𝟘é中😀"),
        b"\x80",
        b"\xe3\x80",
    ]
    pieces += [
        b"\xf0\x9d",
        b"\xef\xbc",
        b"\xed\xa0\x80",
        b"\xc0",
        b"\xff",
        b"\xe0\x80",
        b"\xf4\x90",
    ]
    for _ in range(3000):
        code = b"".join(rng.choices(pieces, k=rng.randint(0, 7)))
        text = code.decode(errors="replace")
        assert automaton.accepts[run(automaton, code)] == bool(re.match(regex, text)), code


def test_the_sets_are_those_of_re():
    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for chars, regex in ((SPACE, r"\s"), (DIGIT, r"\d"), (NOT_NEWLINE, r".")):
        member = re.compile(regex)
        assert all((char in chars) == bool(member.match(char)) for char in every)


def test_decoder_is_decode_with_replacement():
    alphabet = Alphabet([SPACE], apart=[Chars(frozenset("\ufffd")), Chars(frozenset("é中😀"))])
    decoder = compile_decoder(alphabet)
    rng = random.Random(0)
    bytes_of = [0x20, 0x41, 0x80, 0x85, 0x8F, 0x90, 0x9F, 0xA0, 0xA9, 0xB8, 0xBF, 0xC1, 0xC2, 0xC3]
    bytes_of += [0xE0, 0xE3, 0xE4, 0xED, 0xEF, 0xF0, 0xF3, 0xF4, 0xF5, 0xFF]
    for _ in range(20000):
        code = bytes(rng.choices(bytes_of, k=rng.randint(0, 8)))
        if rng.random() < 0.3:
            code = rng.choice(["é", "中", "😀", "\u3000"]).encode()[: rng.randint(1, 4)] + code
        state, classes = 0, []
        for byte in [*code, CUT]:
            for table in (decoder.first, decoder.second):
                if table[state, byte] != SILENT:
                    classes.append(table[state, byte])
            state = decoder.next_state[state, byte]
        assert state == 0
        assert classes == [alphabet[char] for char in code.decode(errors="replace")], code


def test_automata_are_minimal():
    pattern = ("a", Many(ANY), "bc")
    alphabet = Alphabet([pattern])
    automaton = over_bytes(compile_pattern(pattern, alphabet), compile_decoder(alphabet))
    # Before a, after it, after b, matched, failed. What a character begins with changes nothing.
    assert len(automaton.accepts) == 5


def test_lift_runs_whole_strings():
    pattern, _ = PATTERNS[2]
    alphabet = Alphabet([pattern])
    automaton = over_bytes(compile_pattern(pattern, alphabet), compile_decoder(alphabet))
    rng = random.Random(0)
    strings = ["".join(map(chr, rng.choices(range(257), k=rng.randint(0, 9)))) for _ in range(200)]
    strings += ["<a> a", "", "> ", "a"]
    lifted = lift(automaton, strings)
    for row, string in zip(lifted, strings, strict=True):
        for state in range(len(automaton.accepts)):
            expected = state
            for symbol in map(ord, string):
                expected = automaton.next_state[expected, symbol]
            assert row[state] == expected


def test_removal_is_replace():
    literal = "<ab>"
    tokens = [
        "",
        "<",
        "a",
        "b",
        ">",
        "<a",
        "b>",
        "<ab>",
        "<ab><",
        "ab",
        "ab><a",
        ">b",
        "x",
        "b><ab>",
    ]
    removal = compile_removal(literal, tokens)
    rng = random.Random(0)
    removed = 0
    for _ in range(5000):
        row = rng.choices(range(len(tokens)), k=rng.randint(0, 8))
        state, text = 0, ""
        for v in row:
            text += (
                literal[: removal.released[state, v]] + removal.strings[removal.output[state, v]]
            )
            state = removal.next_state[state, v]
        text += literal[:state]
        whole = "".join(tokens[v] for v in row)
        assert text == whole.replace(literal, chr(CUT)), row
        removed += literal in whole
    assert removed > 500


@pytest.mark.parametrize("literal", ["aba", "é!"])
def test_removal_refuses_what_it_cannot_do(literal):
    with pytest.raises(ValueError, match="first character must be ASCII and come only once"):
        compile_removal(literal, ["a"])


def test_distinct_rows():
    a, b = np.array([[1], [2], [1], [1]]), np.array([[0, 1], [0, 1], [0, 1], [9, 9]], np.int8)
    rows, kind = distinct(a, b)
    assert len(rows) == 3
    np.testing.assert_array_equal(a[rows][kind], a)
    np.testing.assert_array_equal(b[rows][kind], b)


@pytest.mark.parametrize(("largest", "dtype"), [(5, "int8"), (127, "int8"), (128, "int16")])
def test_small_integers(largest, dtype):
    assert small(np.array([0, largest])).dtype == dtype
