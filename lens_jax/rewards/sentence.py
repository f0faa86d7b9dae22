"""Rewards that a completion's text earns, read from its tokens on the device.

Format rewards (LENS, sentence level) are regular languages, each one automaton; the box goes to
`box.BoxReader`. All of them read the tokens in one scan.
"""

from collections.abc import Callable

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
    compile_removal,
    distinct,
    lift,
    over_bytes,
    small,
    token_strings,
)
from lens_jax.rewards.box import BoxReader

THINK = ("<think>", Many(ANY), "</think>", Many(SPACE), "<answer>", Many(ANY), "</answer>")
GROUNDING = (
    "<|object_ref_start|>",
    Many(NOT_NEWLINE),
    "<|object_ref_end|><|box_start|>",
    Many(NOT_NEWLINE),
    "<|box_end|><|im_end|>",
)
GROUNDING_REASONING = ("<think>", Many(NOT_NEWLINE), "</think>\n", *GROUNDING)
# Padding of the official rollout, taken out of the text before all but the think format is read.
PADDING = "<|endoftext|>"

TextRewards = dict[str, Bool[Array, "N"] | Float[Array, "N 4"]]
Score = Callable[[Int[Array, "N T"], Int[Array, "N"]], TextRewards]


def text_rewards(tokenizer) -> Score:
    """Compile the rewards for a byte-level Hugging Face tokenizer, once and on the host.

    Returns:
        `score(tokens, lengths)`, to be jitted: int32 tokens [N, T] of which the first `lengths`
        count, end token included. It gives bool [N] `think_format`, `grounding_format` and
        `grounding_format_reasoning`, float32 [N, 4] `box` (zeros where there is none) and bool [N]
        `box_found`. Tokens beyond the tokenizer are no text.
    """
    tokens = [*token_strings(tokenizer), ""]
    think = _automaton(THINK)
    groundings = [_automaton(pattern) for pattern in (GROUNDING, GROUNDING_REASONING)]
    box = BoxReader()

    # What the removal lets through, as symbols that all its readers can tell apart.
    removal = compile_removal(PADDING, tokens)
    lifted = [lift(grounding, removal.strings) for grounding in groundings]
    codes = box.encode(removal.strings)
    rows, symbol = distinct(*lifted, codes)
    grounding_next = [small(table[rows].T) for table in lifted]
    codes = codes[rows].T

    # The same for what the removal lets go of when it held back too much.
    prefixes = [PADDING[:k] for k in range(len(PADDING))]
    prefix_next = [small(lift(grounding, prefixes).T) for grounding in groundings]
    prefix_codes = box.encode(prefixes).T

    # Tokens in kinds that neither the think format nor the removal tells apart.
    lifted_think = lift(think, tokens)
    steps = (removal.next_state, removal.released, symbol[removal.output])
    rows, kind_of_token = distinct(lifted_think, *(table.T for table in steps))
    think_next = small(lifted_think[rows].T)
    next_held, released, output = (small(table[:, rows]) for table in steps)

    def score(tokens: Int[Array, "N T"], lengths: Int[Array, "N"]) -> TextRewards:
        count, steps = tokens.shape
        known = (tokens >= 0) & (tokens < len(kind_of_token) - 1)
        known &= jnp.arange(steps) < lengths[:, None]
        kinds = jnp.asarray(kind_of_token)[jnp.where(known, tokens, len(kind_of_token) - 1)]

        def release(states, held):
            """Read the first `held` characters of the literal as text."""
            *formats, boxes = states
            formats = [_at(table, s, held) for table, s in zip(prefix_next, formats, strict=True)]
            return *formats, box.read(boxes, jnp.asarray(prefix_codes)[:, held])

        def read(states, symbols):
            *formats, boxes = states
            formats = [
                _at(table, s, symbols) for table, s in zip(grounding_next, formats, strict=True)
            ]
            return *formats, box.read(boxes, jnp.asarray(codes)[:, symbols])

        def step(carry, kind):
            think, held, states = carry
            states = release(states, _at(released, held, kind))
            states = read(states, _at(output, held, kind))
            return (_at(think_next, think, kind), _at(next_held, held, kind), states), None

        zeros = jnp.zeros(count, jnp.int32)
        states = (*(zeros for _ in groundings), box.start(count))
        carry, _ = jax.lax.scan(step, (zeros, zeros, states), kinds.T)
        # What is still held back begins the literal, and no match ends with a beginning of it.
        think_state, _, (grounding, grounding_reasoning, boxes) = carry
        values, found = box.finish(boxes)
        return {
            "think_format": jnp.asarray(think.accepts)[think_state],
            "grounding_format": jnp.asarray(groundings[0].accepts)[grounding],
            "grounding_format_reasoning": jnp.asarray(groundings[1].accepts)[grounding_reasoning],
            "box": values,
            "box_found": found,
        }

    return score


def _automaton(pattern: Pattern) -> Automaton:
    alphabet = Alphabet([pattern])
    return over_bytes(compile_pattern(pattern, alphabet), compile_decoder(alphabet))


def _at(table: np.ndarray, row: Int[Array, "N"], column: Int[Array, "N"]) -> Int[Array, "N"]:
    return jnp.asarray(table)[row, column].astype(jnp.int32)
