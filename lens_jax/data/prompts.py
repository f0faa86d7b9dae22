"""Questions and answers of the language model, their tokens and positions (LENS, section 3).

Coordinates in a text are pixels of the resized image (`qwen2p5vl`) or thousandths of the
image's sides (`qwen2vl`), rounded half to even.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

SYSTEM = "You are a helpful assistant. "
QUESTION = "Output the bounding box of the {question} in the image."
REASONING_QUESTION = (
    'Locate "{question}", report the bbox coordinates in JSON format.'
    "Compare the difference between objects and find the most closely matched one."
    "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
    "Output the one bbox inside the interested object in JSON format."
    "i.e., <think>thinking process here</think><answer>answer here</answer>"
)
ANSWER = (
    "<|object_ref_start|>{question}.<|object_ref_end|>"
    "<|box_start|>({0},{1}),({2},{3})<|box_end|><|im_end|>"
)
NO_TARGET = "<|object_ref_start|>{question}.<|object_ref_end|><|im_end|>"
IMAGE_TOKEN = "<|image_pad|>"
COORDINATES = ("qwen2p5vl", "qwen2vl")


@dataclasses.dataclass(frozen=True)
class Templates:
    """The texts around an expression, which stands where they say {question}."""

    system: str = SYSTEM
    question: str = QUESTION
    reasoning_question: str = REASONING_QUESTION

    def __post_init__(self):
        for name in ("question", "reasoning_question"):
            if "{question}" not in getattr(self, name):
                raise ValueError(f"prompt template {name!r} has no {{question}} in it")

    @classmethod
    def from_dict(cls, texts: Mapping[str, str]) -> "Templates":
        """Reads the `prompts` of lens_config.json.

        Raises:
            ValueError: a key that is none of the fields, or whose value is no text.
        """
        if not isinstance(texts, Mapping):
            raise ValueError(f"prompts: expected a JSON object, found {type(texts).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name, text in texts.items():
            if name not in known:
                raise ValueError(f"prompts: unknown key {name!r}, expected {', '.join(known)}")
            if not isinstance(text, str):
                raise ValueError(f"prompts: {name}: expected a text, found {text!r}")
        return cls(**texts)

    def messages(self, expression: str, reasoning: bool = False) -> list[dict[str, Any]]:
        """The conversation that the chat template turns into text."""
        template = self.reasoning_question if reasoning else self.question
        text = template.replace("{question}", expression)
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
        ]


class PromptTokenizer:
    """Expressions to token ids, with a tokenizer's chat template.

    The template is rendered once a kind of question. The expression is text, whatever it holds: the
    stretch around it, up to the template's own special tokens, is encoded as `tokenizer(stretch,
    split_special_tokens=True)` does it, all else as `tokenizer(text)`. Special tokens part a text
    for the tokenizer, so the pieces' tokens are the whole text's tokens.

    A truncation or padding that was saved with the tokenizer is switched off.

    Raises:
        ValueError: the template cannot be rendered, or holds not one image and then the question.
    """

    _MARK = "expression-goes-here"

    def __init__(self, tokenizer: Any, templates: Templates):
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        # A copy, because threads share the tokenizers and none may change a setting of another's.
        self._text_backend = copy.deepcopy(self._backend)
        self._text_backend.encode_special_tokens = True
        added = self._backend.get_added_tokens_decoder()
        self._special = {index for index, token in added.items() if token.special}
        self._questions = [self._question(templates, reasoning) for reasoning in (False, True)]
        self._tail = functools.lru_cache(2**16)(self._encode_tail)

    def _question(self, templates: Templates, reasoning: bool) -> "_Frame":
        """The surroundings of an expression in a rendered question."""
        try:
            text = self.tokenizer.apply_chat_template(
                templates.messages(self._MARK, reasoning),
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates are programs and fail in many ways
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"the chat template cannot be rendered for a picture and a question ({reason}): "
                "it is not that of a Qwen2-VL or Qwen2.5-VL"
            ) from None
        found = text.count(IMAGE_TOKEN)
        if found != 1 or text.count(self._MARK) != 1 or IMAGE_TOKEN in text.split(self._MARK)[1]:
            raise ValueError(
                f"the chat template must hold one {IMAGE_TOKEN} and then the question, once; it "
                f"holds {found} and renders {text[:400]!r}"
            )
        frame = self._frame(text)
        if self.image_token_id not in frame.head:
            raise ValueError(f"the tokenizer does not know {IMAGE_TOKEN} as a special token")
        return frame

    def _frame(self, text: str) -> "_Frame":
        """The surroundings of `_MARK` in a text."""
        start, before, after = text.index(self._MARK), *text.split(self._MARK)
        encoding = self._backend.encode(text, add_special_tokens=False)
        places = [i for i, index in enumerate(encoding.ids) if index in self._special]
        head, first, tail, last = 0, 0, len(encoding.ids), len(text)
        for i in places:
            begin, end = encoding.offsets[i]
            if end <= start:
                head, first = i + 1, end
            else:
                tail, last = i, begin
                break
        return _Frame(
            head=encoding.ids[:head],
            before=before[first:],
            after=after[: last - start - len(self._MARK)],
            tail=encoding.ids[tail:],
        )

    def encode(self, text: str) -> Int[np.ndarray, "L"]:
        """Token ids of a text, special tokens in it included, none added.

        Raises:
            ValueError: half a character, a lone surrogate, is in the text.
        """
        return np.array(_ids(self._backend, text), np.int32)

    def _fill(self, frame: "_Frame", expression: str) -> list[int]:
        """The tokens from the expression's surroundings on."""
        text = f"{frame.before}{expression}{frame.after}"
        return _ids(self._text_backend, text) + frame.tail

    def _encode_tail(self, expression: str, reasoning: bool) -> Int[np.ndarray, "L"]:
        """All that follows the image."""
        frame = self._questions[reasoning]
        first = frame.head.index(self.image_token_id) + 1
        return np.array(frame.head[first:] + self._fill(frame, expression), np.int32)

    def prompt(
        self, expression: str, num_image_tokens: int, reasoning: bool = False
    ) -> tuple[Int[np.ndarray, "P"], int]:
        """A prompt's tokens, and the index of its first image token."""
        head = self._questions[reasoning].head
        start = head.index(self.image_token_id)
        image = np.full(num_image_tokens, self.image_token_id, np.int32)
        before = np.array(head[:start], np.int32)
        return np.concatenate([before, image, self._tail(expression, reasoning)]), start

    def answer(self, expression: str, box: Sequence[int] | None) -> Int[np.ndarray, "T"]:
        """The teacher-forced answer's tokens, end token included; `box` as the text writes it."""
        frame = self._frame(answer_text(self._MARK, box))
        return np.array(frame.head + self._fill(frame, expression), np.int32)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Surroundings of an expression: the text beside it, the tokens before that and after it."""

    head: list[int]
    before: str
    after: str
    tail: list[int]


def _ids(backend: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 30) : error.end + 30]
        raise ValueError(f"the text {around!r} is no valid Unicode") from None
    return backend.encode(text, add_special_tokens=False).ids


def answer_text(expression: str, box: Sequence[int] | None) -> str:
    """Stage 1's answer; `box` is xyxy in the text's own coordinates, None for no target."""
    if box is None:
        return NO_TARGET.replace("{question}", expression)
    return ANSWER.replace("{question}", "\0").format(*box).replace("\0", expression)


def rope_positions(
    length: int, image_start: int, image_grid: tuple[int, int]
) -> tuple[Int[np.ndarray, "3 P"], int]:
    """Qwen's multimodal rotary positions (time, row, column), and the first one after the prompt.

    Text counts on all three axes at once; the image's tokens share one time and count rows and
    columns from there; the text after it goes on from the largest position so far.

    Args:
        length: tokens of the prompt.
        image_start: index of the first image token.
        image_grid: (rows, columns) of image tokens.
    """
    rows, columns = image_grid
    positions = np.empty((3, length), np.int32)
    positions[:, :image_start] = np.arange(image_start)
    end = image_start + rows * columns
    index = np.arange(rows * columns)
    positions[:, image_start:end] = image_start
    positions[1, image_start:end] += (index // columns).astype(np.int32)
    positions[2, image_start:end] += (index % columns).astype(np.int32)
    resume = image_start + max(rows, columns)
    positions[:, end:] = resume + np.arange(length - end)
    return positions, resume + length - end


def coordinate_scale(resized_size: tuple[int, int], coordinates: str) -> tuple[int, int]:
    """Upper ends of a text's coordinates, (height, width): the resized image's, or 1000."""
    if coordinates not in COORDINATES:
        raise ValueError(f"coordinates: {coordinates!r} is none of {', '.join(COORDINATES)}")
    return resized_size if coordinates == "qwen2p5vl" else (1000, 1000)


def box_to_text(
    box: Sequence[float], image_size: tuple[int, int], scale: tuple[int, int]
) -> tuple[int, int, int, int]:
    """An xyxy box in pixels of the image (height, width) as the text writes it."""
    height, width = image_size
    x0, y0, x1, y1 = (float(v) for v in box)
    return (
        round(x0 / width * scale[1]),
        round(y0 / height * scale[0]),
        round(x1 / width * scale[1]),
        round(y1 / height * scale[0]),
    )


def box_to_pixels(
    box: Sequence[float], image_size: tuple[int, int], scale: tuple[int, int]
) -> Float[np.ndarray, "4"]:
    """A text's box as xyxy pixels of the original image (height, width)."""
    x, y = image_size[1] / scale[1], image_size[0] / scale[0]
    return (np.asarray(box, np.float64) * [x, y, x, y]).astype(np.float32)
