"""Model directories as other tools and versions write them, of the tiny model's weights."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax.convert_weights import qwen_vl
from lens_jax.convert_weights.__main__ import main
from lens_jax.convert_weights.reader import from_arrays, open_weights
from lens_jax.data.processor import Processor
from lens_jax.model_configs.qwen_vl import read_qwen_vl
from tests.golden import weights as golden

ROOT = Path(__file__).parents[2]
TINY, SAM = ROOT / "checkpoints" / "tiny" / "qwen2_5_vl", ROOT / "checkpoints" / "tiny" / "sam2"
CONFIG = json.loads((TINY / "config.json").read_text())
TEXT = {
    key: CONFIG[key]
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
    )
}
SENTENCE = "the large <|im_end|> circle"


@pytest.fixture(scope="module")
def tensors():
    return {name: np.array(x.load()) for name, x in open_weights(TINY).items()}


@pytest.fixture
def mllm(tmp_path) -> Path:
    """A directory of one's own to change."""
    return Path(shutil.copytree(TINY, tmp_path / "mllm"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def replace_weights(mllm: Path, tensors: golden.Tensors) -> None:
    (mllm / "model.safetensors").unlink()
    golden.write_safetensors(mllm, tensors, 1)


def convert(mllm: Path, output: Path) -> int:
    flags = [f"--mllm={mllm}", f"--sam={SAM}", f"--output={output}"]
    return main(["from_torch", *flags])


def refusal(capsys, mllm: Path) -> str:
    """The one line that conversion ends with."""
    output = mllm.parent / "out"
    assert convert(mllm, output) == 2 and not output.exists()
    [line] = capsys.readouterr().err.strip().splitlines()
    assert str(mllm) in line
    return line


def facts(checkpoint: Path):
    """What decides a checkpoint's numbers, besides the tensors."""
    processor = Processor.from_pretrained(checkpoint)
    picture = np.arange(150 * 200 * 3, dtype=np.uint8).reshape(150, 200, 3)
    prompt = processor.prompt(picture, SENTENCE)
    answer = processor.encoder.answer(SENTENCE, (1, 2, 3, 4))
    shapes = checkpoints.model_shapes(checkpoint, checkpoints.read_config(checkpoint))
    return prompt.tokens.tolist(), answer.tolist(), prompt.patches.tobytes(), shapes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    output = tmp_path_factory.mktemp("base") / "lens"
    assert convert(TINY, output) == 0
    return output


def as_transformers_4_52(mllm, tensors):
    """Both levels, and null where it has nothing."""
    nested = TEXT | {
        "model_type": "qwen2_5_vl_text",
        "image_token_id": None,
        "video_token_id": None,
        "tie_word_embeddings": True,
    }
    edit(mllm / "config.json", text_config=nested)


def as_released(mllm, tensors):
    """The tokenizer's template is for texts, that for pictures is in a file of its own."""
    edit(mllm / "tokenizer_config.json", chat_template="{{ 'x' + messages[1].content }}")
    sections = CONFIG["rope_scaling"]["mrope_section"]
    edit(mllm / "config.json", rope_scaling={"type": "mrope", "mrope_section": sections})


def as_transformers_5(mllm, tensors):
    """One level, other names, the picture's settings in processor_config.json."""
    nested = {k: v for k, v in TEXT.items() if not k.startswith("rope")}
    nested["tie_word_embeddings"] = True
    nested["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": CONFIG["rope_theta"],
        "mrope_section": CONFIG["rope_scaling"]["mrope_section"],
    }
    flat = {k: v for k, v in CONFIG.items() if k not in TEXT and k != "tie_word_embeddings"}
    vision = {k: v for k, v in CONFIG["vision_config"].items() if k not in ("window_size",)}
    vision |= {"model_type": "qwen2_5_vl_vision"}
    flat |= {"text_config": nested, "vision_config": vision, "dtype": flat.pop("torch_dtype")}
    (mllm / "config.json").write_text(json.dumps(flat))
    settings = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 9000, "longest_edge": 12800},  # as in preprocessor_config.json
        "min_pixels": None,
        "max_pixels": None,
    }
    (mllm / "preprocessor_config.json").unlink()
    (mllm / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    template = json.loads((mllm / "chat_template.json").read_text())["chat_template"]
    (mllm / "chat_template.json").unlink()
    (mllm / "chat_template.jinja").write_text(template)
    edit(mllm / "tokenizer_config.json", chat_template=None, tokenizer_class="TokenizersBackend")
    tensors = {
        f"model.{name}"
        if name.startswith("visual.")
        else f"model.language_model.{name.removeprefix('model.')}": x
        for name, x in tensors.items()
    }
    replace_weights(mllm, tensors)


def as_a_training_left_it(mllm, tensors):
    """The settings of the tokenizer's last call are saved with it."""
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    edit(mllm / "tokenizer.json", truncation=cut)


@pytest.mark.parametrize(
    "write", [as_transformers_4_52, as_released, as_transformers_5, as_a_training_left_it]
)
def test_the_same_model_in_another_form(mllm, tensors, base, write, tmp_path):
    write(mllm, tensors)
    assert convert(mllm, tmp_path / "out") == 0
    assert facts(tmp_path / "out") == facts(base)
    assert (
        checkpoints.saved_params(tmp_path / "out").keys() == checkpoints.saved_params(base).keys()
    )
    # What is exported says the same again, and no key of a released file without a value.
    for layout in ("lens", "hf"):
        flags = [f"--checkpoint={tmp_path / 'out'}", f"--layout={layout}"]
        assert main(["to_torch", *flags, f"--output={tmp_path / layout}"]) == 0
    flags = [f"--lens={tmp_path / 'lens'}", f"--output={tmp_path / 'again'}"]
    assert main(["from_torch", *flags]) == 0
    assert facts(tmp_path / "again") == facts(base)
    hf = json.loads((tmp_path / "lens" / "config.json").read_text())
    assert None not in hf.values() and "text_config" not in hf
    assert hf["torch_dtype"] == "float32" and "dtype" not in hf
    assert hf["tie_word_embeddings"] is True and hf["image_token_id"] == CONFIG["image_token_id"]
    plain = json.loads((tmp_path / "hf" / "mllm" / "config.json").read_text())
    assert plain["tie_word_embeddings"] is True and plain["model_type"] == "qwen2_5_vl"
    text = plain.get("text_config") or plain
    assert text["rope_theta"] == CONFIG["rope_theta"]
    assert text["rope_scaling"]["mrope_section"] == CONFIG["rope_scaling"]["mrope_section"]
    assert plain["vision_config"]["window_size"] == CONFIG["vision_config"]["window_size"]


@pytest.mark.parametrize("head", ["none", "the embedding", "another"])
def test_of_two_levels_the_weights_decide_what_is_tied(tensors, head):
    """Older versions of transformers leave a default in one of them."""
    embedding = tensors["model.embed_tokens.weight"]
    heads = {"none": {}, "the embedding": {"lm_head.weight": embedding}}
    heads["another"] = {"lm_head.weight": embedding[::-1].copy()}
    source = from_arrays({"model.embed_tokens.weight": embedding} | heads[head])
    nested = {"tie_word_embeddings": True}
    hf = CONFIG | {"tie_word_embeddings": False, "text_config": nested}
    settled = qwen_vl.settle_tie(hf, source)
    tied = head != "another"
    assert settled["tie_word_embeddings"] is settled["text_config"]["tie_word_embeddings"] is tied
    assert read_qwen_vl(settled).tie_word_embeddings is tied
    for level in ({"tie_word_embeddings": None}, {"text_config": None}):
        assert qwen_vl.settle_tie(hf | level, source) == hf | level  # nothing to settle


def adapter(mllm, tensors):
    for file in mllm.iterdir():
        file.unlink()
    (mllm / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    golden.write_safetensors(mllm, {"base_model.model.x.lora_A.weight": np.zeros((2, 2))}, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapter, "adapter_config.json says that this is a LoRA adapter.*merge_and_unload"),
        ("base_model.model.{}", r"begin with base_model\.model\. as peft writes them.*merge"),
        ("module.{}", r"begin with module\. as DataParallel or DeepSpeed.*model\.module"),
        ("_orig_mod.{}", r"begin with _orig_mod\. as torch\.compile"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": (2, 2)}, "belongs to a LoRA adapter"),
        ({"model.layers.0.mlp.up_proj.weight.absmax": (2,)}, "belongs to quantised weights"),
        ({"patch_size": 16}, "patch_size is 16: only 14"),
        ({"image_token_id": 445}, "image_token_id is 445, but the tokenizer's .* is 446"),
        ({"eos_token_id": None}, "generation_config.json: no eos_token_id"),
    ],
)
def test_what_is_no_such_model_is_one_line(mllm, tensors, capsys, change, said):
    if callable(change):
        change(mllm, tensors)
    elif isinstance(change, str):
        replace_weights(mllm, {change.format(name): x for name, x in tensors.items()})
    elif "patch_size" in change:
        edit(mllm / "config.json", vision_config=CONFIG["vision_config"] | change)
    elif "image_token_id" in change:
        edit(mllm / "config.json", **change)
    elif "eos_token_id" in change:
        edit(mllm / "generation_config.json", **change)
    else:
        [(name, shape)] = change.items()
        replace_weights(mllm, tensors | {name: np.zeros(shape, np.float32)})
    assert re.search(said, refusal(capsys, mllm))


ROPE = {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 6, 6]}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("tokenizer", {"model": [1]}, "no byte-level BPE"),
        ("tokenizer", {"decoder": "ByteLevel"}, "no byte-level BPE"),
        ("preprocessor_config", {"max_pixels": float("inf")}, "max_pixels: expected a whole"),
        ("preprocessor_config", {"image_mean": 0.5}, "image_mean: expected three numbers"),
        ("preprocessor_config", {"image_mean": [float("nan")] * 3}, "image_mean: expected three"),
        ("preprocessor_config", {"image_mean": [True] * 3}, "image_mean: expected three"),
        ("preprocessor_config", {"min_pixels": 0, "max_pixels": 10}, "max_pixels is 10: one"),
        ("preprocessor_config", {"size": {"height": 448, "width": 448}}, "size: height is 448"),
        ("generation_config", {"eos_token_id": 2**40}, "eos_token_id is 1099511627776: the"),
        ("generation_config", {"eos_token_id": [436, -1]}, "eos_token_id is -1: the model's"),
        ("generation_config", {"eos_token_id": 448}, "448: the model's tokens are 0 to 447"),
        ("generation_config", {"repetition_penalty": float("inf")}, "repetition_penalty"),
        ("config", {"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a positive number"),
        ("config", {"image_token_id": None}, "151655 where the file does not say, but the tok"),
        ("config", {"vision_config": {"window_size": 14}}, "window_size is 14: less than one"),
        (
            "config",
            {"rope_parameters": ROPE | {"mrope_section": [8, 4, 4]}},
            "rope_scaling: mrope_section is [4, 6, 6], but [8, 4, 4] in rope_parameters",
        ),
        (
            "config",
            {"rope_parameters": ROPE | {"rope_theta": 1e6}},
            "rope_theta is 30.0, but 1000000.0 in rope_parameters",
        ),
    ],
)
def test_settings_that_no_such_model_has_are_one_line(mllm, capsys, name, changes, said):
    """Refused at conversion, not when the checkpoint is loaded."""
    file = mllm / f"{name}.json"
    if "vision_config" in changes:
        changes = {"vision_config": CONFIG["vision_config"] | changes["vision_config"]}
    edit(file, **changes)
    line = refusal(capsys, mllm)
    assert f"{file}: " in line and said in line


def test_a_token_past_the_embedding_is_refused(mllm, capsys):
    content = json.loads((mllm / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 448, "content": "<seg>"})
    edit(mllm / "tokenizer.json", added_tokens=content["added_tokens"])
    assert "'<seg>' is number 448, but vocab_size in config.json is 448" in refusal(capsys, mllm)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"student.{name}", r"80 names carry the prefix student\."),
        (
            lambda name: None if name.startswith("visual.") else name,
            r"42 tensors are missing \(visual.*nothing of visual\.\* is there",
        ),
    ],
)
def test_many_stray_tensors_are_one_line(mllm, tensors, capsys, rename, said):
    renamed = {rename(name): x for name, x in tensors.items()}
    renamed.pop(None, None)
    replace_weights(mllm, renamed)
    assert re.search(said, refusal(capsys, mllm))


def test_every_one_of_many_stray_tensors_is_told_by_a_pattern(mllm, tensors, capsys):
    replace_weights(mllm, {f"{name}_": x for name, x in tensors.items()} | {"stray": np.zeros(3)})
    assert convert(mllm, mllm.parent / "out") == 2
    summary, *lines = capsys.readouterr().err.strip().splitlines()
    assert "80 tensors are missing" in summary and "81 tensors are unexpected" in summary
    assert len(lines) < 81
    for kind, ending, extra in (("missing", "", []), ("unexpected", "_", ["stray"])):
        patterns = {line.split()[-1] for line in lines if f" {kind} tensor" in line}
        names = {re.sub(r"\.\d+\.", ".*.", name) + ending for name in tensors}
        assert names | set(extra) == {re.sub(r"\.\d+\.", ".*.", x) for x in patterns}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", "{{ messages[1].content }}", "must hold one"),
        ("tokenizer.json", "{}", "no byte-level BPE"),
        ("preprocessor_config.json", '{"do_resize": false}', "do_resize is False"),
    ],
)
def test_files_beside_the_weights_are_checked_before_them(mllm, capsys, name, content, said):
    (mllm / name).write_text(content)
    line = refusal(capsys, mllm)
    assert f"{mllm / name}: " in line and said in line
