"""The shipped tokenizer is what the script makes, and does what it was made for."""

import string

from lens_jax.data import prompts
from lens_jax.preparation import shapes
from tests.data.conftest import TINY
from tools import make_tiny_tokenizer


def test_script_makes_the_shipped_files(tmp_path):
    make_tiny_tokenizer.write(tmp_path)
    made = sorted(tmp_path.iterdir())
    assert len(made) == 5
    for file in made:
        assert file.read_bytes() == (TINY / file.name).read_bytes(), file.name


def test_words_of_the_task_are_single_tokens(tokenizer):
    words = {word for sentence in shapes.all_sentences() for word in sentence.split()}
    words |= set(prompts.QUESTION.replace("{question}", "").rstrip(".").split()[1:])
    assert [word for word in words if len(tokenizer.tokenize(" " + word)) != 1] == []
    assert tokenizer.tokenize("(12,34),(5,6)") == [
        "(", "1", "2", ",", "3", "4", "),(", "5", ",", "6", ")"
    ]  # fmt: skip


def test_special_tokens_come_last_in_qwens_order(tokenizer):
    assert len(tokenizer) == make_tiny_tokenizer.VOCABULARY
    ids = tokenizer.convert_tokens_to_ids(list(make_tiny_tokenizer.SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_any_text_survives(tokenizer):
    for text in ("Größe ６４ 図形 🟥\r\n\t x", string.printable, "<|im_end|> <think>"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
