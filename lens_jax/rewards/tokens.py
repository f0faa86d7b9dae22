"""The tokens of a vocabulary as byte strings, and automata over them.

An automaton is lifted from bytes to tokens: `next_state[state, token]`. Tokens that no automaton
can tell apart share a column: a vocabulary of 150,000 has a few thousand different ones.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lens_jax.rewards.automaton import CUT, Automaton


def token_strings(tokenizer) -> list[str]:
    """The bytes of every token of a byte-level BPE tokenizer, special tokens spelled as their text.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """
    if tokenizer.convert_tokens_to_string(["Ġ"]) != " ":
        raise ValueError(
            f"{type(tokenizer).__name__} is not a byte-level BPE tokenizer; rewards read bytes, "
            "so use a tokenizer of the Qwen family"
        )
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    alphabet = byte_alphabet()
    table = str.maketrans(alphabet)
    return [
        # The tokenizers' decoder takes a token for bytes only if all of it can be.
        token.translate(table)
        if alphabet.keys() >= set(token)
        else token.encode().decode("latin-1")
        for token in (token or "" for token in tokens)
    ]


def byte_alphabet() -> dict[str, str]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest moves up to 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    shifted = {chr(256 + i): chr(byte) for i, byte in enumerate(others)}
    return {chr(byte): chr(byte) for byte in printable} | shifted


def lift(automaton: Automaton, strings: Sequence[str]) -> np.ndarray:
    """The state after a whole byte string, from every state: int16 [len(strings), S]."""
    count, symbols = automaton.next_state.shape
    table = automaton.next_state.astype(np.int16).reshape(-1)
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    order = np.argsort(-lengths, kind="stable")
    lengths, starts = lengths[order], (np.cumsum(lengths) - lengths)[order]
    text = np.frombuffer("".join(strings).encode("utf-16-le"), np.uint16)
    lifted = np.tile(np.arange(count, dtype=np.int16), (len(strings), 1))
    for i in range(lengths.max(initial=0)):
        active = np.searchsorted(-lengths, -i)  # the strings longer than i come first
        index = lifted[:active].astype(np.int32) * symbols + text[starts[:active] + i, None]
        np.take(table, index, out=lifted[:active], mode="clip")
    result = np.empty_like(lifted)
    result[order] = lifted
    return result


@dataclasses.dataclass(frozen=True)
class Removal:
    """Takes a literal out of a text, however tokens cut it.

    The state is how many characters of the literal are held back until the rest comes. For state
    k and token v there are `next_state[k, v]`; `released[k, v]`, how many of the k characters held
    back turned out to be text; and `output[k, v]`, the index in `strings` of the token's own text
    so far. Tables are int [len(literal), V].
    """

    next_state: np.ndarray
    released: np.ndarray
    output: np.ndarray
    strings: list[str]


def compile_removal(literal: str, tokens: Sequence[str]) -> Removal:
    """The removal of an ASCII literal whose first character does not come back in it."""
    if literal[0] in literal[1:] or not literal.isascii():
        raise ValueError(f"{literal!r}: the first character must be ASCII and come only once")
    indices: dict[str, int] = {}  # string -> index
    prefixes = [literal[:k] for k in range(len(literal) - 1, 0, -1)]

    def clean(string: str) -> tuple[int, int]:
        """Text without the literal, and how many of its last characters may begin another."""
        string = string.replace(literal, chr(CUT))
        held = next((len(p) for p in prefixes if string.endswith(p)), 0)
        string = string[: len(string) - held]
        return indices.setdefault(string, len(indices)), held

    # Characters held back become text when a token comes that does not go on with the literal.
    cleaned = np.array([clean(token) for token in tokens], np.int32)
    output, next_state = (np.tile(column, (len(literal), 1)) for column in cleaned.T)
    released = np.tile(np.arange(len(literal), dtype=np.int32)[:, None], (1, len(tokens)))
    nothing, _ = clean("")
    inside = [(k, literal[k:]) for k in range(1, len(literal))]
    for v, token in enumerate(tokens):
        if token[:1] not in literal:
            continue
        for k, rest in inside:
            if token.startswith(rest):
                output[k, v], next_state[k, v] = clean(chr(CUT) + token[len(rest) :])
                released[k, v] = 0
            elif rest.startswith(token):
                output[k, v], next_state[k, v], released[k, v] = nothing, k + len(token), 0
    return Removal(next_state, released, output, [*indices])


def small(table: np.ndarray) -> np.ndarray:
    """The same integers in as few bytes as hold them."""
    return table.astype(np.result_type(np.min_scalar_type(-table.max() - 1), np.int8))
