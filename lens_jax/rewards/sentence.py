"""Rewards that a completion's text earns, read from its tokens on the device.

Each format reward (LENS, sentence level) is a regular language, one automaton; `box.BoxReader`
reads the box. A table says at once what every token does to an automaton. Only tokens that change
a state are then read one after the other: a few dozen in a text of hundreds.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lens_jax.rewards.automaton import (
    ANY,
    NOT_NEWLINE,
    SPACE,
    Alphabet,
    Automaton,
    Many,
    Pattern,
    compile_decoder,
    compile_pattern,
    distinct,
    over_bytes,
)
from lens_jax.rewards.box import BoxReader, at, next_place
from lens_jax.rewards.tokens import compile_removal, lift, small, token_strings

THINK = ("<think>", Many(ANY), "</think>", Many(SPACE), "<answer>", Many(ANY), "</answer>")
GROUNDING = (
    "<|object_ref_start|>",
    Many(NOT_NEWLINE),
    "<|object_ref_end|><|box_start|>",
    Many(NOT_NEWLINE),
    "<|box_end|><|im_end|>",
)
GROUNDING_REASONING = ("<think>", Many(NOT_NEWLINE), "</think>\n", *GROUNDING)
FORMATS = ("think_format", "grounding_format", "grounding_format_reasoning")
# Padding of the official rollout. It is taken out of the text for all but the think format.
PADDING = "<|endoftext|>"

TextRewards = dict[str, Bool[Array, "N"] | Float[Array, "N 4"]]
TextScorer = Callable[[Int[Array, "N T"], Int[Array, "N"]], TextRewards]


def text_rewards(tokenizer) -> TextScorer:
    """Compiles the rewards for a byte-level Hugging Face tokenizer, once and on the host.

    Returns:
        `score(tokens, lengths)`, to be jitted: int32 tokens [N, T] of which the first `lengths`
        count, end token included. It gives bool [N] `think_format`, `grounding_format` and
        `grounding_format_reasoning`, float32 [N, 4] `box` (zeros where there is none) and bool [N]
        `box_found`. Tokens beyond the tokenizer are no text.
    """
    tokens = [*token_strings(tokenizer), ""]
    think, *groundings = map(_automaton, (THINK, GROUNDING, GROUNDING_REASONING))
    automata = (think, *groundings)
    removal, reader = compile_removal(PADDING, tokens), BoxReader()

    # Tokens in kinds that neither the think format nor the removal tells apart. What a token does
    # depends on how much of the padding is held back before it: all tables are [held, kind].
    think_of_string = lift(think, tokens)
    rows, kind_of_token = distinct(
        think_of_string, removal.next_state.T, removal.released.T, removal.output.T
    )
    held_after = small(removal.next_state[:, rows])
    think_of_kind = think_of_string[rows]
    released, output = removal.released[:, rows], removal.output[:, rows]

    # For the formats: a move is what one token does to all their states.
    prefixes = [PADDING[:k] for k in range(len(PADDING))]
    after_prefix = [lift(grounding, prefixes) for grounding in groundings]
    after_string = [lift(grounding, removal.strings) for grounding in groundings]
    kinds = np.broadcast_to(np.arange(len(rows)), released.shape)
    effects = [
        think_of_kind[kinds.reshape(-1)],
        *(
            # First the characters let go of, then the token's own.
            np.take_along_axis(
                string[output.reshape(-1)], prefix[released.reshape(-1)].astype(np.int64), axis=1
            )
            for prefix, string in zip(after_prefix, after_string, strict=True)
        ),
    ]
    rows, move = distinct(*effects)
    moves = [effect[rows] for effect in effects]
    stays = np.logical_and.reduce([(m == np.arange(m.shape[1])).all(1) for m in moves])
    # A move made twice in a row that does no more than once need not be made again.
    once = np.logical_and.reduce([(np.take_along_axis(m, m, axis=1) == m).all(1) for m in moves])
    move = small(move.reshape(released.shape))
    moves = [small(m.T) for m in moves]

    # For the box: what is let go of, if anything, ends an attempt as any other character does.
    pieces = [*removal.strings, *(PADDING[0] + string for string in removal.strings)]
    codes = reader.encode(pieces)
    rows, piece_of_string = distinct(codes)
    codes = codes[rows]
    piece = small(piece_of_string[output + len(removal.strings) * (released > 0)])

    def score(tokens: Int[Array, "N T"], lengths: Int[Array, "N"]) -> TextRewards:
        steps = tokens.shape[1]
        known = (tokens >= 0) & (tokens < len(kind_of_token) - 1)
        known &= jnp.arange(steps) < lengths[:, None]
        kinds = jnp.asarray(kind_of_token)[jnp.where(known, tokens, len(kind_of_token) - 1)]
        held = _held_before(held_after, kinds)
        moves_made = jnp.asarray(move)[held, kinds].astype(jnp.int32)
        states = _run(moves, moves_made, jnp.asarray(stays), jnp.asarray(once))
        # What is still held back begins the literal, and no match ends with a beginning of it.
        formats = {
            name: jnp.asarray(automaton.accepts)[state]
            for name, automaton, state in zip(FORMATS, automata, states, strict=True)
        }
        box, found = reader.find(codes, jnp.asarray(piece)[held, kinds].astype(jnp.int32))
        return {**formats, "box": box, "box_found": found}

    return score


def _held_before(held_after: np.ndarray, kinds: Int[Array, "N T"]) -> Int[Array, "N T"]:
    """Number of the padding's characters that are held back before each token.

    All steps are repeated at once until nothing changes: once, and once more for every token that
    spells the longest piece of the padding.
    """
    table = jnp.asarray(held_after)

    def shifted(after):
        return jnp.pad(after[:, :-1], ((0, 0), (1, 0))).astype(jnp.int32)

    def again(carry):
        before, _ = carry
        after = shifted(table[before, kinds])
        return after, jnp.any(after != before)

    before = jnp.zeros_like(kinds)
    return jax.lax.while_loop(lambda carry: carry[1], again, (before, jnp.bool_(True)))[0]


def _run(
    tables: Sequence[np.ndarray],
    moves: Int[Array, "N T"],
    stays: Bool[Array, "M"],
    once: Bool[Array, "M"],
) -> list[Int[Array, "N"]]:
    """The state of each automaton after all moves, from state 0; moves that do nothing are skipped.

    Args:
        tables: the state after each move, [S, M], of each automaton.
        stays: moves that leave every state as it is.
        once: moves that do the same once or several times in a row.
    """
    count, steps = moves.shape
    repeated = jnp.pad(moves[:, 1:] == moves[:, :-1], ((0, 0), (1, 0)))
    following = next_place(~stays[moves] & ~(repeated & once[moves]))

    def step(carry):
        place, states = carry
        move = at(moves, place)
        states = [
            jnp.where(place < steps, _at(table, state, move), state)
            for table, state in zip(tables, states, strict=True)
        ]
        return at(following, place + 1), states

    zeros = jnp.zeros(count, jnp.int32)
    start = following[:, 0], [zeros for _ in tables]
    return jax.lax.while_loop(lambda carry: jnp.any(carry[0] < steps), step, start)[1]


def _automaton(pattern: Pattern) -> Automaton:
    alphabet = Alphabet([pattern])
    return over_bytes(compile_pattern(pattern, alphabet), compile_decoder(alphabet))


def _at(table: np.ndarray, row: Int[Array, "N"], column: Int[Array, "N"]) -> Int[Array, "N"]:
    return jnp.asarray(table)[row, column].astype(jnp.int32)
