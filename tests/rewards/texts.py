"""What the rewards must agree with: Python's `re` on the decoded text. And texts to try them on."""

import math
import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.official_text import expected
from lens_jax.rewards.tokens import byte_alphabet

FORMATS = ("think_format", "grounding_format", "grounding_format_reasoning")

PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "</think>\n", "\n", " ", "\u3000", "\u2028"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|im_end|>"),
    *("<|endoftext|>", "<|endof", "text|>", "<|", "<", "|>"),
    *("[", "]", "(", ")", ",", ", ", "-", ".", "7", "12", "٣", "５", "𝟘", "中", "é", "a red cup"),
]
SPECIAL = [
    *("<|endoftext|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>"),
]
TEMPLATES = [
    "<think>{text}</think>{gap}<answer>{box}</answer>{text}",
    "<|object_ref_start|>{text}<|object_ref_end|><|box_start|>{box}<|box_end|><|im_end|>",
    "<think>{text}</think>\n"
    "<|object_ref_start|>{text}<|object_ref_end|><|box_start|>{box}<|box_end|><|im_end|>{text}",
    "{text}{box}{text}{box}",
]


def byte_level_tokenizer(tokens: list[bytes]) -> PreTrainedTokenizerFast:
    """Every single byte, then these tokens, then the special ones; it decodes, no more."""
    chars = {ord(byte): char for char, byte in byte_alphabet().items()}
    tokens = [*(bytes([b]) for b in range(256)), *tokens]
    spelled = dict.fromkeys("".join(chars[b] for b in token) for token in tokens)
    backend = Tokenizer(BPE({token: i for i, token in enumerate(spelled)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def large_vocabulary(size: int, seed: int = 0) -> list[bytes]:
    """What a vocabulary of a large model is like: words, runs of spaces, code, characters of many
    scripts whole and cut, several characters of the patterns in one token."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    syllables = [a + b for a in letters for b in "aeiou"] + [*letters, "th", "st", "ing", "ed"]
    scripts = [range(0xC0, 0x250), range(0x400, 0x500), range(0x600, 0x6FF), range(0x900, 0xDFF)]
    scripts += [range(0x3000, 0x3100), range(0x4E00, 0x9FA5), range(0xAC00, 0xD7A3)]
    scripts += [range(0xFF00, 0xFFEF), range(0x1D7CE, 0x1D800), range(0x1F300, 0x1F650)]
    signs = "()[]{}<>|,.-:;=_/\"'!? \n\t0123456789"
    parts = [piece[i:j] for piece in PIECES for i in range(len(piece)) for j in range(i + 1, 15)]

    def word() -> str:
        text = "".join(rng.choices(syllables, k=rng.randint(1, 4)))
        return rng.choice(["", " "]) + rng.choice([text, text.capitalize(), text.upper()])

    def foreign() -> str:
        script = rng.choice(scripts)
        return "".join(chr(rng.choice(script)) for _ in range(rng.choice([1, 1, 2, 3])))

    makers = [word] * 6 + [
        foreign,
        lambda: "".join(rng.choices(signs, k=rng.randint(1, 5))),
        lambda: rng.choice([" ", "\n", "\t", "\u3000"]) * rng.randint(1, 40),
        lambda: "".join(rng.choices(parts, k=rng.choice([1, 1, 2, 3]))),
        lambda: str(rng.randrange(10**4)) + rng.choice(["", ",", "),(", "]", ".5"]),
    ]
    tokens: dict[bytes, None] = {}
    while len(tokens) < size:
        token = rng.choice(makers)().encode()
        if rng.random() < 0.05:  # byte pairs cut characters, too
            token = token[rng.choice([0, 1]) : len(token) - rng.choice([0, 1, 2])]
        if len(token) > 1:
            tokens[token] = None
    return [*tokens]


def decode(tokenizer, ids) -> str:
    known = [int(i) for i in ids if i < len(tokenizer)]
    return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check(tokenizer, out: dict, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, int]:
    """Assert that `out` is what `expected` says of every row; returns how many rows have what."""
    counts = dict.fromkeys((*FORMATS, "box"), 0)
    for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        text = decode(tokenizer, row[:length])
        want = expected(text)
        for name in FORMATS:
            assert out[name][i] == want[name], (name, text)
            counts[name] += want[name]
        counts["box"] += want["box"] is not None
        assert out["box_found"][i] == (want["box"] is not None), text
        for ours, theirs in zip(out["box"][i], want["box"] or [0] * 4, strict=True):
            assert same_number(ours, theirs), (ours, theirs, text)
    return counts


def same_number(ours: np.float32, theirs: float) -> bool:
    """Exact to 7 significant digits and 10 decimals, to 1e-6 beyond; float32 may overflow."""
    with np.errstate(over="ignore"):
        rounded = np.float32(theirs)
    short = float(f"{theirs:.7g}") == theirs == round(theirs, 10) and abs(theirs) < 1e10
    if short or math.isinf(rounded):
        return ours == rounded
    return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-37)


class Writer:
    """Random texts near what the patterns ask for, in random tokens of a tokenizer."""

    def __init__(self, tokenizer, token_bytes: list[bytes], seed: int):
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.ids: dict[bytes, list[int]] = {}
        for i, token in enumerate(token_bytes):
            if token:
                self.ids.setdefault(token, []).append(i)
        self.sizes: dict[int, set[int]] = {}  # first byte -> lengths of the tokens
        for token in self.ids:
            self.sizes.setdefault(token[0], set()).add(len(token))

    def rows(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 tokens [count, length] and lengths [count]; what is past a length is random too."""
        size = len(self.tokenizer) + 20  # some are beyond the tokenizer
        rng = np.random.default_rng(self.random.randrange(2**32))
        tokens = rng.integers(0, size, (count, length)).astype(np.int32)
        lengths = np.zeros(count, np.int32)
        for i in range(count):
            row = self.row()[:length]
            tokens[i, : len(row)], lengths[i] = row, len(row)
        return tokens, lengths

    def row(self) -> list[int]:
        draw = self.random.random()
        if draw < 0.05:
            size = len(self.tokenizer) + 20
            return [self.random.randrange(size) for _ in range(self.random.randint(0, 40))]
        if draw < 0.25:
            text = "".join(self.random.choices(PIECES, k=self.random.randint(0, 20)))
        else:
            text = self.random.choice(TEMPLATES).replace("{gap}", self.gap())
            while "{" in text:
                text = text.replace("{box}", self.box(), 1).replace("{text}", self.text(), 1)
        code = bytearray(text.encode())
        for _ in range(self.random.choice([0, 0, 0, 1, 2])):
            at = self.random.randint(0, len(code))
            piece = self.random.choice(PIECES).encode()
            if self.random.random() < 0.5:
                piece = piece[: self.random.randint(0, len(piece))]  # may cut a character
            code[at : at + self.random.choice([0, 0, 1])] = piece
        return self.tokens(bytes(code))

    def tokens(self, code: bytes) -> list[int]:
        """Any tokens that spell these bytes."""
        row = []
        whole = self.random.random() < 0.5  # long tokens, special ones among them, where there are
        while code:
            lengths = [n for n in self.sizes[code[0]] if code[:n] in self.ids]
            n = max(lengths) if whole else self.random.choice(lengths)
            row.append(self.random.choice(self.ids[code[:n]]))
            code = code[n:]
        return row

    def gap(self) -> str:
        return self.random.choice(["", "", " ", "\n", " \n\t ", "\u3000", "\x1c", "\u200b", "x"])

    def text(self) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.choice([0, 1, 2, 5])))

    def number(self) -> str:
        draw = self.random.random()
        if draw < 0.1:
            return self.random.choice(["-0", "007", "٣٤", "1２.٥", "1.", ".5", "--1", "1.2.3"])
        if draw < 0.2:
            digits = "".join(self.random.choices("0123456789", k=self.random.randint(1, 45)))
            at = self.random.randint(0, len(digits))
            return digits[:at] + self.random.choice(["", "."]) + digits[at:]
        sign = self.random.choice(["", "", "", "-"])
        fraction = self.random.choice(["", "", ".5", f".{self.random.randrange(10**4)}", ".250000"])
        return f"{sign}{self.random.randrange(1100)}{fraction}"

    def box(self) -> str:
        a, b, c, d = (self.number() for _ in range(4))
        gaps = [self.random.choice(["", "", "", " ", "\n", "\u3000"]) for _ in range(7)]
        u, v, w, x, y, z, e = gaps if self.random.random() < 0.5 else [""] * 7
        return self.random.choice(
            [
                f"[{u}{a},{v}{b},{w}{c},{x}{d}{y}]",
                f"({u}{a},{v}{b},{w}{c},{x}{d}{y})",
                f"({u}{a},{v}{b}),{w}({x}{c},{y}{d})",
                f"({u}{a},{v}{b}),({x}{c},{y}{d}),({a},{b})",
                f"({u}{a},{v}{b}{z}),{w}({x}{c},{y}{d}{e})",
                f"[{a},[{b},{c},{d},{a}]",
                f"[{a},{b},[{c},{d}]]",
                f"({a},({b},{c}),({d},{a}),({b},{c}))",
                f"[{a},{b},{c},{d},{a}]",
            ]
        )
