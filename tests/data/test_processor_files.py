"""Tokenizers, chat templates and picture settings in the forms that releases have them in."""

import json
import shutil
from pathlib import Path

import pytest

from lens_jax.data import images, processor_files
from lens_jax.data.processor import Processor
from lens_jax.files import CheckpointError
from tests.data.conftest import TINY

CONFIG = {"mllm": {"vision_config": {}}, "sam": {"image_size": 64}}
# The order of the tokenizer's own template in Qwen2.5-VL's releases: for texts and tools.
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
TOKENIZER_CONFIG = json.loads((TINY / "tokenizer_config.json").read_text())
PICTURES = TOKENIZER_CONFIG.pop("chat_template")


@pytest.fixture
def directory(tmp_path) -> Path:
    """A pretrained checkpoint's files, without its weights and without a chat template."""
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    write(tmp_path, "tokenizer_config.json", TOKENIZER_CONFIG)
    write(tmp_path, "lens_config.json", CONFIG)
    return tmp_path


def write(directory: Path, name: str, content) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(text, encoding="utf-8")


def refusal(directory: Path) -> str:
    """What loading says; one line."""
    with pytest.raises(CheckpointError) as caught:
        Processor.from_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tokens(directory: Path, expression: str = "the red circle") -> list[int]:
    encoder = Processor.from_pretrained(directory).encoder
    return encoder.prompt(expression, 3)[0].tolist() + encoder.answer(expression, None).tolist()


@pytest.mark.parametrize(
    ("files", "used"),
    [
        ({"tokenizer_config.json": "{tokenizer}"}, "tokenizer"),
        ({"tokenizer_config.json": "text", "chat_template.json": "{json}"}, "json"),
        ({"tokenizer_config.json": "{tokenizer}", "chat_template.json": None}, "tokenizer"),
        (
            {
                "tokenizer_config.json": "text",
                "chat_template.json": "{json}",
                "chat_template.jinja": "{jinja}",
            },
            "jinja",
        ),
        ({"chat_template.jinja": "{jinja}"}, "jinja"),
        ({"tokenizer_config.json": [("tool_use", "text"), ("default", "{list}")]}, "list"),
    ],
)
def test_the_template_for_pictures_is_found(directory, tokenizer, files, used):
    """The processor's, before the tokenizer's."""

    def template(text):
        if text in (None, "text"):
            return text and TEXT_ONLY
        return PICTURES.replace("<|im_start|>", f"{text.strip('{}')}<|im_start|>")

    for name, content in files.items():
        if isinstance(content, list):
            value = [{"name": key, "template": template(text)} for key, text in content]
        else:
            value = template(content)
        if name.endswith(".json"):
            value = {"chat_template": value}
        if name == "tokenizer_config.json":
            value = TOKENIZER_CONFIG | value
        write(directory, name, value)
    text = tokenizer.decode(tokens(directory))
    assert text.startswith(f"{used}<|im_start|>system\nYou are a helpful assistant. <|im_end|>")
    assert "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>Output" in text


@pytest.mark.parametrize(
    ("name", "template", "reason"),
    [
        ("tokenizer_config.json", TEXT_ONLY, "cannot be rendered for a picture and a question"),
        ("chat_template.json", "{{ messages[1].content }}", "holds 0 and renders"),
        ("chat_template.json", PICTURES.replace("<|image_pad|>", ""), "holds 0 and renders"),
        ("chat_template.jinja", PICTURES.replace("<|image_pad|>", "<|image_pad|>" * 2), "holds 2"),
        ("chat_template.jinja", "", "holds 0"),
        ("chat_template.jinja", "{% if %}", "cannot be rendered"),
        ("chat_template.jinja", "{{ raise_exception('no\npictures') }}", "cannot be rendered"),
        ("tokenizer_config.json", None, "no chat_template"),
        ("tokenizer_config.json", [{"name": "rag", "template": PICTURES}], "no chat_template"),
    ],
)
def test_a_template_without_one_picture_is_refused(directory, name, template, reason):
    value = template if name.endswith("jinja") else {"chat_template": template}
    if name == "tokenizer_config.json":
        value = TOKENIZER_CONFIG | value
    write(directory, name, value)
    message = refusal(directory)
    assert message.startswith(f"{directory / name}: ") and reason in message


def test_a_saved_truncation_and_padding_are_switched_off(directory):
    """transformers saves the settings of the tokenizer's last call with it."""
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    sentence = "the very small red circle on the left of the large blue square below " * 3
    expected = tokens(directory, sentence), tokens(directory, "it")
    content = json.loads((TINY / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 16,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 434,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    write(directory, "tokenizer.json", content)
    assert (tokens(directory, sentence), tokens(directory, "it")) == expected
    write(directory, "tokenizer_config.json", TOKENIZER_CONFIG | {"split_special_tokens": True})
    assert (tokens(directory, sentence), tokens(directory, "it")) == expected


def test_slow_files_give_the_same_tokens(directory):
    """vocab.json and merges.txt, as older versions of transformers save a tokenizer."""
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    expected = tokens(directory, "Ünï <|im_end|> 12 circles")
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (directory / "tokenizer.json").unlink()
    write(directory, "vocab.json", model["vocab"])
    write(directory, "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    assert tokens(directory, "Ünï <|im_end|> 12 circles") == expected


def test_a_byte_order_mark_is_no_part_of_a_template(directory):
    write(directory, "chat_template.jinja", PICTURES)
    expected = tokens(directory)
    write(directory, "chat_template.jinja", "\ufeff" + PICTURES)
    assert tokens(directory) == expected


@pytest.mark.parametrize("size", [(20, 300), (300, 20)])
def test_a_long_picture_under_a_small_limit_keeps_one_token_a_side(size):
    height, width = images.smart_resize(*size, 0, 784)
    assert min(height, width) == 28


PREPROCESSOR = json.loads((TINY / "preprocessor_config.json").read_text())
SIZELESS = {k: v for k, v in PREPROCESSOR.items() if k not in ("min_pixels", "max_pixels")}
TYPE = {"image_processor_type": "Qwen2VLImageProcessorFast"}


def test_a_picture_longer_than_suits_the_model_is_warned_of(directory):
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    write(directory, "preprocessor_config.json", PREPROCESSOR | {"familiar_aspect_ratio": None})
    assert Processor.from_pretrained(directory).unfamiliar((10, 1000)) is None
    write(directory, "preprocessor_config.json", PREPROCESSOR | {"familiar_aspect_ratio": 1.5})
    processor = Processor.from_pretrained(directory)
    assert processor.unfamiliar((100, 150)) is None and processor.unfamiliar((150, 100)) is None
    assert "300 x 100 pixels" in processor.unfamiliar((100, 300))
    assert "100 x 151 pixels" in processor.unfamiliar((151, 100))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        (TYPE, (3136, 1_000_000)),
        (SIZELESS | {"size": {"shortest_edge": 4000, "longest_edge": 6272}}, (4000, 6272)),
        (SIZELESS | {"size": {"min_pixels": 4000, "max_pixels": 6272}}, (4000, 6272)),
        (PREPROCESSOR | {"min_pixels": 4000, "max_pixels": 12845056}, (4000, 1_000_000)),
        (
            PREPROCESSOR | {"min_pixels": 1003520, "max_pixels": 12845056},
            (1_000_000, 1_000_000),
        ),
        (
            SIZELESS | {"min_pixels": None, "max_pixels": 6272, "size": {"shortest_edge": 4000}},
            (4000, 6272),
        ),
        (
            TYPE
            | {"do_resize": True, "resample": 3, "rescale_factor": 0.00392156862745098}
            | {"image_mean": None, "patch_size": None, "size": None, "data_format": "x"},
            (3136, 1_000_000),
        ),
    ],
)
def test_picture_settings_in_every_form(directory, nested, settings, limits):
    if nested:
        (directory / "preprocessor_config.json").unlink()
        write(directory, "processor_config.json", {"image_processor": settings})
    else:
        write(directory, "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
        write(directory, "preprocessor_config.json", settings)
    read = processor_files.read_images(directory)
    assert (read.min_pixels, read.max_pixels) == limits
    assert read.mean == tuple(PREPROCESSOR["image_mean"])
    assert read.std == tuple(PREPROCESSOR["image_std"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"patch_size": 16}, "patch_size is 16: only 14"),
        ({"merge_size": 4}, "merge_size is 4"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is CLIPImage"),
        ({"image_mean": [0.5]}, "image_mean: expected three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std: expected three numbers above 0"),
        ({"min_pixels": "many"}, "min_pixels: expected a whole number"),
        ({"min_pixels": 10**6, "max_pixels": 10**5}, "min_pixels 1000000 is more than max_pixels"),
        ({"size": 3}, "size: expected a JSON object"),
        ({"familiar_aspect_ratio": 0.5}, "familiar_aspect_ratio: expected a number of at least 1"),
    ],
)
def test_picture_settings_that_are_not_computed_are_refused(directory, settings, reason):
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    write(directory, "preprocessor_config.json", PREPROCESSOR | settings)
    message = refusal(directory)
    assert message.startswith(f"{directory / 'preprocessor_config.json'}: ") and reason in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompts": {"sytem": "x"}}, "prompts: unknown key 'sytem'"),
        ({"prompts": {"question": "Where?"}}, "'question' has no {question} in it"),
        ({"prompts": {"system": 3}}, "prompts: system: expected a text"),
        ({"prompts": None}, "prompts: expected a JSON object"),
        ({"coordinates": "pixels"}, "coordinates: 'pixels'"),
        ({"mllm": {"vision_config": {"patch_size": 16}}}, "patch_size is 16"),
        ({"mllm": {}}, "the key 'vision_config' is missing"),
        ({"sam": {}}, "the key 'image_size' is missing"),
    ],
)
def test_a_broken_lens_config_is_one_line(directory, change, reason):
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    write(directory, "lens_config.json", CONFIG | change)
    message = refusal(directory)
    assert message.startswith(f"{directory / 'lens_config.json'}: ") and reason in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not JSON"),
        ({"version": "1.0"}, "no byte-level BPE tokenizer"),
        ({"decoder": {"type": "ByteLevel"}}, "cannot read the tokenizer"),
        (
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"},
                "decoder": {"type": "Metaspace", "replacement": "▁"},
                "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0]]},
            },
            "no byte-level BPE tokenizer",
        ),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(directory, content, reason):
    write(directory, "chat_template.json", {"chat_template": PICTURES})
    write(directory, "tokenizer.json", content)
    for kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
        write(directory, "tokenizer_config.json", TOKENIZER_CONFIG | {"tokenizer_class": kind})
        message = refusal(directory)
        assert message.startswith(f"{directory / 'tokenizer.json'}") and reason in message


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("{", "is not JSON"),
        ({}, "no eos_token_id"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id: expected token ids"),
        ({"eos_token_id": 436, "repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_generation_settings_that_end_nothing_are_refused(tmp_path, settings, reason):
    write(tmp_path, "generation_config.json", settings)
    with pytest.raises(CheckpointError, match=f"generation_config.json.*{reason}"):
        processor_files.read_generation(tmp_path)
