"""Text rewards agree with Python's `re` on the decoded text, however tokens cut it."""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lens_jax.aot import hlo
from lens_jax.config import MeshConfig
from lens_jax.distribution import sharding
from lens_jax.rewards import text_rewards
from lens_jax.rewards.tokens import token_strings
from tests.data.conftest import TINY
from tests.rewards.conftest import GOLDEN
from tests.rewards.texts import (
    FORMATS,
    PIECES,
    Writer,
    byte_level_tokenizer,
    check,
    decode,
    large_vocabulary,
)

# Tokens that hold much of a pattern, several of them, or halves of characters.
LONG_TOKENS = [
    *("[1,2,3,4]", "),(", "], [", "1,2", ",-3.5", "(12,", "00", "0.0", "]foo[", "x(1,2),(3,4)y"),
    *(
        "</think><answer>",
        "<think>a</think>\n",
        "</answer>",
        "|><|box_start|>",
        "<|end",
        "oftext|>",
    ),
    *("<|endoftext|><|endof", "t|>7", "text|>,", "a<", "  \n\t ", "\u3000\u3000", "中文", "３４"),
    *("é[", "0" * 12, "[[((", "))]]", "foo)bar", "(a)", "1)", "(b", ">\n", "|", "e", "xt"),
]
LONG_BYTES = [b"\xef\xbc", b"\x95", b"\xbc\x95,", b"\xf0\x9d", b"\x9f\x98]", b"\xa3\xd9", b"[\xd9"]


def byte_strings(tokenizer) -> list[bytes]:
    return [string.encode("latin-1") for string in token_strings(tokenizer)]


@pytest.fixture(scope="module")
def long_tokenizer():
    return byte_level_tokenizer([*(token.encode() for token in LONG_TOKENS), *LONG_BYTES])


@pytest.fixture(scope="module")
def large_tokenizer():
    """As many tokens as Qwen's."""
    return byte_level_tokenizer(large_vocabulary(150_000))


@pytest.fixture(scope="module")
def large_score(large_tokenizer):
    return jax.jit(text_rewards(large_tokenizer))


def test_token_bytes_are_what_the_tokenizer_decodes(tokenizer, long_tokenizer, large_tokenizer):
    for tok in (tokenizer, long_tokenizer, large_tokenizer):
        rng = np.random.default_rng(0)
        strings = byte_strings(tok)
        assert len(strings) == len(tok)
        for ids in rng.integers(0, len(tok), (300, 12)):
            text = b"".join(strings[i] for i in ids).decode(errors="replace")
            assert text == decode(tok, ids)


def test_random_texts(tokenizer, score):
    tokens, lengths = Writer(tokenizer, byte_strings(tokenizer), seed=0).rows(5000, 160)
    counts = check(tokenizer, jax.device_get(score(tokens, lengths)), tokens, lengths)
    assert min(counts.values()) > 200, counts  # the texts try what they should


def test_random_texts_in_long_tokens(long_tokenizer):
    writer = Writer(long_tokenizer, byte_strings(long_tokenizer), seed=1)
    tokens, lengths = writer.rows(3000, 160)
    out = jax.jit(text_rewards(long_tokenizer))(tokens, lengths)
    counts = check(long_tokenizer, jax.device_get(out), tokens, lengths)
    assert min(counts.values()) > 100, counts


def test_random_texts_in_a_large_vocabulary(large_tokenizer, large_score):
    assert len(large_tokenizer) > 150_000
    strings = byte_strings(large_tokenizer)
    tokens, lengths = Writer(large_tokenizer, strings, seed=2).rows(5000, 160)
    out = jax.device_get(large_score(tokens, lengths))
    counts = check(large_tokenizer, out, tokens, lengths)
    assert min(counts.values()) > 200, counts


def test_tables_of_a_large_vocabulary_are_small(large_score, large_tokenizer):
    """What the device holds: a column for each kind of token, not for each token."""
    tokens, lengths = np.zeros((2, 160), np.int32), np.zeros(2, np.int32)
    program = large_score.trace(tokens, lengths).jaxpr
    sizes = [np.asarray(constant).nbytes for constant in program.consts]
    assert 4 * len(large_tokenizer) < sum(sizes) < 16e6, sizes


@pytest.mark.nightly
@pytest.mark.parametrize("which", ["golden", "tiny", "large"])
def test_200_000_random_texts(which, tokenizer, large_tokenizer):
    """The proof: run it with `pytest -m nightly`."""
    tok = {"golden": tokenizer, "large": large_tokenizer}.get(which)
    tok = tok or AutoTokenizer.from_pretrained(TINY)
    score, strings = jax.jit(text_rewards(tok)), byte_strings(tok)
    total = dict.fromkeys((*FORMATS, "box"), 0)
    for seed in range(40):
        tokens, lengths = Writer(tok, strings, seed=1000 + seed).rows(5000, 160)
        counts = check(tok, jax.device_get(score(tokens, lengths)), tokens, lengths)
        total = {name: total[name] + count for name, count in counts.items()}
    assert min(total.values()) > 8000, total


def test_golden_completions_in_a_large_vocabulary(large_tokenizer, large_score):
    """All of golden's texts, in random tokens of many bytes, several times."""
    writer = Writer(large_tokenizer, byte_strings(large_tokenizer), seed=4)
    lines = (GOLDEN / "rewards.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["completion"] for line in lines]
    rows = [writer.tokens(text.encode()) for _ in range(3) for text in texts]
    lengths = np.array([*map(len, rows)], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    check(large_tokenizer, jax.device_get(large_score(tokens, lengths)), tokens, lengths)


def rows_of(tokenizer, texts: list[str | list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of texts, always of one shape: it is compiled once."""
    ids = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    tokens, lengths = np.full((16, 160), tokenizer.eos_token_id, np.int32), np.zeros(16, np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_tokens(tokenizer, score, data):
    """The same from examples that shrink: pieces of the patterns and any token, in any order."""
    pieces = [tokenizer.encode(piece) for piece in PIECES]
    token = st.integers(0, len(tokenizer) + 5).map(lambda i: [i])
    drawn = data.draw(st.lists(st.sampled_from(pieces) | token, max_size=30))
    tokens, lengths = rows_of(tokenizer, [[*itertools.chain(*drawn)][:160]])
    check(tokenizer, jax.device_get(score(tokens, lengths)), tokens, lengths)


def test_end_of_text_stays_in_the_think_format(tokenizer, score):
    """It is padding for the other formats and the box, as a token or spelled in characters."""
    think = "<think>a</think>{}<answer>b</answer>"
    grounding = "<|object_ref_start|>a<|object_ref_end|>{}<|box_start|>b<|box_end|><|im_end|>"
    byte_ids = {text: i for i, text in reversed([*enumerate(byte_strings(tokenizer))])}
    spelled = [byte_ids[bytes([b])] for b in b"<|endoftext|>"]
    texts = []
    for form in (think, grounding, "[1,2{},3,4]"):
        head, tail = (tokenizer(s, add_special_tokens=False)["input_ids"] for s in form.split("{}"))
        texts += [
            head + tail,
            head + tokenizer.encode("<|endoftext|>") + tail,
            head + spelled + tail,
        ]
    tokens, lengths = rows_of(tokenizer, texts)
    out = jax.device_get(score(tokens, lengths))
    check(tokenizer, out, tokens, lengths)
    assert out["think_format"][:9].tolist() == [True, False, False] + [False] * 6
    assert out["grounding_format"][:9].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert out["box_found"][:9].tolist() == [False] * 6 + [True] * 3


def test_what_is_removed_joins_text_but_no_characters(tokenizer, score):
    """Halves of a digit on both sides of an end of text are two U+FFFD, not the digit."""
    byte_ids = {text: i for i, text in reversed([*enumerate(byte_strings(tokenizer))])}
    end = tokenizer.encode("<|endoftext|>")

    def ids(*codes: bytes) -> list[int]:
        return [byte_ids[bytes([b])] for code in codes for b in code]

    digit = "５".encode()
    texts = [
        ids(b"[1,2,3,", digit, b"]"),
        ids(b"[1,2,3,", digit[:1]) + end + ids(digit[1:], b"]"),
        ids(b"[1,2,3,", digit[:2]) + end + ids(digit[2:], b"]"),
        ids(b"[1,2,3,", digit[:2], b"<|endoftext|>", digit[2:], b"]"),
        ids(b"[1,2,3,", digit) + end + ids(b"6]"),
        ids(b"[1,2,3,4") + ids(b"<|endof") + end + ids(b"text|>]"),  # removed only once
    ]
    tokens, lengths = rows_of(tokenizer, texts)
    out = jax.device_get(score(tokens, lengths))
    check(tokenizer, out, tokens, lengths)
    assert out["box_found"][:6].tolist() == [True, False, False, False, True, False]
    assert out["box"][4].tolist() == [1, 2, 3, 56]


def test_only_the_first_length_tokens_count(tokenizer, score):
    tokens, lengths = rows_of(tokenizer, ["[1,2,3,4]"] * 16)
    lengths -= np.arange(16) % 2
    out = score(tokens, lengths)
    np.testing.assert_array_equal(out["box_found"], np.arange(16) % 2 == 0)
    assert out["box"].dtype == np.float32 and out["think_format"].dtype == bool
    assert not out["box"][1::2].any()


def test_sharded_rows_need_no_communication(tokenizer, score):
    tokens, lengths = Writer(tokenizer, byte_strings(tokenizer), seed=2).rows(16, 160)
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    arguments = jax.device_put((tokens, lengths), sharding.batch_sharding(mesh))
    compiled = jax.jit(sharding.by_rows(score, mesh)).lower(*arguments).compile()
    assert not hlo.Module(compiled.as_text()).collectives()
    out, alone = compiled(*arguments), score(tokens, lengths)
    for name in (*FORMATS, "box", "box_found"):
        np.testing.assert_array_equal(out[name], alone[name])


def test_other_tokenizers_are_refused(tokenizer):
    class Sentencepiece:
        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("▁", " ")

    with pytest.raises(ValueError, match="Sentencepiece is not a byte-level BPE tokenizer"):
        text_rewards(Sentencepiece())
