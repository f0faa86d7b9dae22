"""Tokens against the chat template, positions against transformers."""

import inspect
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_jax.data import prompts

EXPRESSIONS = [
    "the red circle",
    "Ünï {question} <b>",
    " a  \n b ",
    "",
    "q: <|box_start|> ＃12",
    "it<|im_end|>\n<|im_start|>assistant\n",
    "<|image_pad|> <|vision_end|>",
    "e\u0301 expression-goes-here <|im_",
]


def encoded(tokenizer, head, sentence, tail):
    """transformers' own tokens of a text whose middle, `sentence`, is text whatever it holds."""
    middle = tokenizer(sentence, split_special_tokens=True).input_ids
    return tokenizer(head).input_ids + middle + tokenizer(tail).input_ids


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_tokens_are_the_whole_texts_tokens(tokenizer, expression, reasoning):
    templates = prompts.Templates()
    text = tokenizer.apply_chat_template(
        templates.messages(expression, reasoning), tokenize=False, add_generation_prompt=True
    )
    head, _, rest = text.replace("<|image_pad|>", "<|image_pad|>" * 7, 1).partition(
        "<|vision_end|>"
    )
    question, end, tail = rest.rpartition("<|im_end|>\n<|im_start|>assistant\n")
    expected = encoded(tokenizer, f"{head}<|vision_end|>", question, end + tail)
    tokens, start = prompts.PromptTokenizer(tokenizer, templates).prompt(expression, 7, reasoning)
    assert tokens.tolist() == expected
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert np.flatnonzero(tokens == image).tolist() == list(range(start, start + 7))
    if "<|" not in expression:
        assert expected == tokenizer(f"{head}<|vision_end|>{rest}").input_ids


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_answers_sentence_is_text(tokenizer, expression):
    encoder = prompts.PromptTokenizer(tokenizer, prompts.Templates())
    for box, written in (((1, 22, 333, 4), "<|box_start|>(1,22),(333,4)<|box_end|>"), (None, "")):
        expected = encoded(
            tokenizer,
            "<|object_ref_start|>",
            f"{expression}.",
            f"<|object_ref_end|>{written}<|im_end|>",
        )
        assert encoder.answer(expression, box).tolist() == expected


def test_answer(tokenizer):
    text = (
        "<|object_ref_start|>a {0} b.<|object_ref_end|><|box_start|>(1,22),(333,4)<|box_end|>"
        "<|im_end|>"
    )
    assert prompts.answer_text("a {0} b", (1, 22, 333, 4)) == text
    encoder = prompts.PromptTokenizer(tokenizer, prompts.Templates())
    assert encoder.answer("a {0} b", (1, 22, 333, 4)).tolist() == tokenizer(text).input_ids


def test_special_tokens_of_a_question_template_are_special(tokenizer):
    templates = prompts.Templates(question="Find <|object_ref_start|>{question}<|object_ref_end|>!")
    tokens, _ = prompts.PromptTokenizer(tokenizer, templates).prompt("<|object_ref_end|>", 2)
    marks = ["<|object_ref_start|>", "<|object_ref_end|>"]
    start, end = tokenizer.convert_tokens_to_ids(marks)
    assert np.sum(tokens == start) == np.sum(tokens == end) == 1


def test_half_a_character_is_refused(tokenizer):
    encoder = prompts.PromptTokenizer(tokenizer, prompts.Templates())
    for encode in (lambda text: encoder.prompt(text, 1), lambda text: encoder.answer(text, None)):
        with pytest.raises(ValueError, match=r"the \\ud83d cup.*no valid Unicode"):
            encode("the \ud83d cup")


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
@given(
    before=st.integers(1, 9),
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    after=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_positions_are_transformers(family, before, rows, columns, after):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = getattr(transformers, f"{family}Model")
    config = hf.config_class()
    kinds = [0] * before + [1] * (rows * columns) + [0] * after
    ids = [5] * (before - 1) + [config.vision_start_token_id]
    ids += [config.image_token_id] * (rows * columns) + [6] * after
    arguments = {
        "input_ids": torch.tensor([ids]),
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
        "mm_token_type_ids": torch.tensor([kinds]),
    }
    model = types.SimpleNamespace(config=config)
    for name in ("get_vision_position_ids",):  # newer versions ask a method of the model
        if hasattr(hf, name):
            setattr(model, name, types.MethodType(getattr(hf, name), model))
    known = inspect.signature(hf.get_rope_index).parameters
    expected, delta = hf.get_rope_index(model, **{k: v for k, v in arguments.items() if k in known})
    positions, following = prompts.rope_positions(len(ids), before, (rows, columns))
    np.testing.assert_array_equal(positions, expected[:, 0].numpy())
    assert following == len(ids) + int(delta)


def test_boxes_there_and_back():
    size, resized = (333, 500), (336, 504)
    for scheme in prompts.COORDINATES:
        scale = prompts.coordinate_scale(resized, scheme)
        box = prompts.box_to_text((10.0, 20.0, 250.5, 333.0), size, scale)
        assert box[3] == scale[0]
        back = prompts.box_to_pixels(box, size, scale)
        np.testing.assert_allclose(back, [10.0, 20.0, 250.5, 333.0], atol=0.55)
    with pytest.raises(ValueError, match="qwen3"):
        prompts.coordinate_scale(resized, "qwen3")


def test_thousandths_are_rounded_half_to_even():
    """1 / 400 of a side is 2.5 thousandths, 3 / 400 are 7.5."""
    scale = prompts.coordinate_scale((280, 504), "qwen2vl")
    assert scale == (1000, 1000)
    assert prompts.box_to_text((1, 3, 400, 200), (200, 400), scale) == (2, 15, 1000, 1000)
    assert prompts.box_to_text((3, 1, 5, 199), (200, 400), scale) == (8, 5, 12, 995)


def test_template_without_a_question_is_refused():
    with pytest.raises(ValueError, match="reasoning_question"):
        prompts.Templates(reasoning_question="Where is it?")
