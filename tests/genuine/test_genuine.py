"""Genuine directories convert and predict what their own code does, and go back where they came."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from PIL import Image

from lens_jax import Lens, checkpoints
from lens_jax.convert_weights import from_torch, to_torch
from lens_jax.convert_weights.__main__ import main
from lens_jax.data.processor import Processor
from lens_jax.data.prompts import Templates
from lens_jax.model_configs.lens import read_lens
from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.model_configs.sam import read_hf_sam2, read_sam1, write_sam2
from lens_jax.models.qwen_vl.config import PRESETS
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.sam.config import PRESETS as SAM2_PRESETS
from lens_jax.models.sam.config import SAM_PRESETS
from lens_jax.models.sam.segmenter import PIXEL_MEAN, PIXEL_STD
from tests.genuine import build
from tests.genuine.conftest import SAM

torch = pytest.importorskip("torch")

RELEASED = ("qwen2_5_vl_3b", "qwen2_vl_2b", "qwen2_vl_7b")
SAVED_AGAIN = sorted(
    file.stem for file in build.ARTEFACTS.glob("qwen*.json") if ".released" not in file.name
)
SAMS = sorted(file.stem for file in build.ARTEFACTS.glob("sam*.json"))
PREDICTED = ("sam1.transformers_4.57.1", SAM, "sam2.1_image.transformers_5.24.0")
QUESTION = "red circle on the left"
COMPLETION = "(12,8),(40,36)"
TOLERANCE = 1e-3  # of the largest value, as `verify --forward true` has it


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def params(checkpoint: Path) -> dict[str, np.ndarray]:
    return dict(checkpoints.iterate_params(checkpoint))


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


def close(ours, theirs) -> None:
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@functools.lru_cache(8)
def lens(checkpoint: Path) -> Lens:
    return Lens.from_pretrained(checkpoint)


# --- our side -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="definition")
def _logits(state, prompts, *, definition):
    model = nnx.merge(definition, state)
    mask = jnp.ones(prompts.tokens.shape, bool)
    hidden, _ = model.language.prefill(model.embed(prompts), prompts.positions, mask)
    return logits(hidden, model.language.head)[0]


def our_logits(model: Lens) -> np.ndarray:
    """Of every token of the prompt."""
    prompts = model.processor.prompts([picture()], [QUESTION])
    return _logits(model.state, prompts, definition=model.definition)


def fed(checkpoint: Path) -> dict[str, np.ndarray]:
    """What a checkpoint's model is fed with the picture and the question."""
    prompts = Processor.from_pretrained(checkpoint).prompts([picture()], [QUESTION])
    return {name: np.asarray(x) for name, x in vars(prompts).items()}


# --- PyTorch's side -------------------------------------------------------------------------------


def load(directory: Path, model_class) -> torch.nn.Module:
    """In float32; every tensor has its place, and every place its tensor."""
    model, info = model_class.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    # Files before transformers 5 hold the matrix of positions once; newer ones draw the second.
    info["missing_keys"] -= {"prompt_encoder.shared_embedding.positional_embedding"}
    assert not any(info.values()), info
    return model.eval()


def mllm_class(directory: Path):
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def their_inputs(directory: Path) -> dict[str, torch.Tensor]:
    """The prompt through transformers' own tokenizer and picture processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    processor = transformers.AutoImageProcessor.from_pretrained(directory)
    text = tokenizer.apply_chat_template(
        Templates().messages(QUESTION),
        chat_template=build.WITH_PICTURES,
        tokenize=False,
        add_generation_prompt=True,
    )
    pixels = processor(images=[picture()], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        **pixels,
    }


@torch.no_grad()
def their_logits(directory: Path, release: Path) -> torch.Tensor:
    """Of a directory's model; tokenizer and processor are those of the release."""
    return load(directory, mllm_class(directory))(**their_inputs(release)).logits[0]


@torch.no_grad()
def their_masks(directory: Path, model_class, token: np.ndarray) -> torch.Tensor:
    """The mask that a prompt token draws, chosen as in evaluation."""
    model = load(directory, model_class)
    side = model.config.prompt_encoder_config.image_size
    pixels = np.asarray(picture().resize((side, side), Image.Resampling.BILINEAR), np.float32)
    pixels = torch.from_numpy((pixels - PIXEL_MEAN) / PIXEL_STD).float().permute(2, 0, 1)[None]
    features, more = model.get_image_embeddings(pixels), {}
    if model_class is transformers.Sam2Model:
        *fine, features = features
        more = {"high_resolution_features": fine}
    dense = model.prompt_encoder.no_mask_embed.weight[..., None, None].expand_as(features)
    masks, *_ = model.mask_decoder(
        image_embeddings=features,
        image_positional_embeddings=model.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=torch.from_numpy(token.copy())[None, None, None],
        dense_prompt_embeddings=dense,
        multimask_output=False,
        **more,
    )
    return masks[0, 0, 0]


# --- language models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAVED_AGAIN)
def test_the_same_model_saved_again_is_the_same(converted, name):
    release = converted(f"{name.split('.')[0]}.released")
    ours = converted(name)
    same(params(ours), params(release))
    mine, theirs = (read_lens(checkpoints.read_config(d)) for d in (ours, release))
    assert mine == theirs
    a, b = map(fed, (ours, release))
    for key, x in b.items():
        np.testing.assert_array_equal(a[key], x, err_msg=key)


def test_the_spelling_of_the_module_tree_is_the_same_model(converted, genuine, tmp_path):
    """As whoever saves the state dict of a newer transformers writes it."""
    name = "qwen2_5_vl_3b.transformers_5.24.0"
    tensors = build.draw(build.record(name)["tensors"])
    directory = build.write(
        name, tmp_path / "new", {build.new_spelling(key): x for key, x in tensors.items()}
    )
    from_torch(tmp_path / "out", mllm=directory, sam=genuine(SAM), num_queries=5)
    same(params(tmp_path / "out"), params(converted(name)))


@pytest.mark.parametrize("name", RELEASED)
def test_logits_are_those_of_transformers(converted, genuine, name):
    """From the picture and the question on, through each side's own files."""
    release = genuine(f"{name}.released")
    ours = our_logits(lens(converted(f"{name}.released")))
    close(ours, their_logits(release, release))


@pytest.mark.parametrize("model", ["Qwen2.5-VL-3B-Instruct", "Qwen2-VL-2B-Instruct"])
def test_published_sizes_in_every_form(model):
    forms = published(model)
    for form, config in forms.items():
        assert read_qwen_vl(config) == PRESETS[model], form


def test_the_7b_has_a_head_of_its_own_in_every_form():
    first, *rest = map(read_qwen_vl, published("Qwen2-VL-7B-Instruct").values())
    assert (first.vocab_size, first.tie_word_embeddings, first.hidden_size) == (152064, False, 3584)
    assert first.vision.out_hidden_size == 3584 and first.vision.depth == 32
    assert all(config == first for config in rest)


def published(name: str) -> dict[str, dict]:
    """A published model's config.json: as released, and by the version that saved it again."""
    return json.loads((build.ARTEFACTS / "published_configs.json").read_text())[name]


# --- SAM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PREDICTED)
def test_masks_are_those_of_transformers(converted, genuine, name):
    model = lens(converted("qwen2_5_vl_3b.released", name))
    model_class = transformers.SamModel if name.startswith("sam1") else transformers.Sam2Model
    token = model.context_embedding(picture(), QUESTION, COMPLETION)
    ours = model.mask_logits(picture(), QUESTION, COMPLETION)
    close(ours, their_masks(genuine(name), model_class, token))


@pytest.mark.parametrize("name", sorted(set(SAMS) - set(PREDICTED)))
def test_the_same_sam_saved_again_is_the_same(converted, name):
    """Sam2VideoModel's directories hold what Sam2Model's do, and what only videos need."""
    release = "qwen2_5_vl_3b.released"
    first = PREDICTED[0] if name.startswith("sam1") else PREDICTED[2]
    ours, theirs = (converted(release, sam) for sam in (name, first))
    same(
        {key: x for key, x in params(ours).items() if not key.startswith("unused/")},
        {key: x for key, x in params(theirs).items() if not key.startswith("unused/")},
    )
    assert checkpoints.read_config(ours)["sam"] == checkpoints.read_config(theirs)["sam"]


@pytest.mark.parametrize("name", ["sam1", "sam2", "sam2.1"])
def test_metas_file_is_the_same_model(converted, genuine, tmp_path, capsys, name):
    """In a folder as the hub has it: Hugging Face's config.json beside Meta's own file."""
    form = f"{name}.transformers_4.57.1"
    known = build.record(form)
    (tmp_path / "config.json").write_text(json.dumps(known["files"]["config.json"]))
    tensors = {key: torch.from_numpy(x) for key, x in build.meta_tensors(form).items()}
    file = tmp_path / {"sam1": "sam_vit_h_4b8939.pth"}.get(name, f"{name}_hiera_large.pt")
    torch.save(tensors if name == "sam1" else {"model": tensors}, file)
    release = genuine("qwen2_5_vl_3b.released")
    arguments = [f"--mllm={release}", "--dtype=float32", "--num_queries=5"]
    assert main(["from_torch", *arguments, f"--sam={file}", f"--output={tmp_path / 'out'}"]) == 0
    same(params(tmp_path / "out"), params(converted("qwen2_5_vl_3b.released", form)))
    dropped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dropped")]
    assert set(dropped) == ({f"dropped sam.{n}" for n in build.MEMORY} if name != "sam1" else set())
    carried = {key for key in params(tmp_path / "out") if key.startswith("unused/")}
    extra = {"unused/sam/no_obj_embed_spatial", "unused/sam/obj_ptr_tpos_proj/weight"}
    assert extra <= carried if name == "sam2.1" else not extra & carried
    # The folder itself, with both files in it, is Hugging Face's.
    build.write_tensors(tmp_path, build.draw(known["tensors"]))
    from_torch(tmp_path / "again", mllm=release, sam=tmp_path, dtype="float32", num_queries=5)
    same(params(tmp_path / "again"), params(tmp_path / "out"))


def test_published_sams_are_told_by_their_config():
    for size, preset in SAM2_PRESETS.items():
        for config in published(f"sam2.1-hiera-{size.replace('_', '-')}").values():
            assert read_hf_sam2(config) == preset
    for size, preset in (("base", "vit_b"), ("large", "vit_l"), ("huge", "vit_h")):
        for config in published(f"sam-vit-{size}").values():
            assert read_sam1(config) == SAM_PRESETS[preset]


# --- LENS -----------------------------------------------------------------------------------------


def write_lens(directory: Path, mllm: str, changes: dict[str, np.ndarray] | None = None) -> Path:
    """An official LENS after stage 2, with what its trainer leaves in the directory."""
    sam, width = build.record(SAM), 32
    shapes = build.record(f"lens.{mllm}")["tensors"] | build.context_shapes(width, 8, 16)
    tensors = build.draw(shapes)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # DeepSpeed saves both
    tensors |= {f"sam.{name}": x for name, x in build.meta_tensors(SAM).items()}
    build.write(f"lens.{mllm}", directory, tensors | (changes or {}), shards=2)
    # Official ones hold SAM 2 large, which its shapes tell; this one is small.
    shapes = read_hf_sam2(sam["files"]["config.json"])
    (directory / "sam2_config.json").write_text(json.dumps(write_sam2(shapes)))
    torch.save({"seed": 42}, directory / "training_args.bin")
    (directory / "trainer_state.json").write_text('{"global_step": 1500}')
    (directory / "latest").write_text("global_step1500")
    return directory


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return write_lens(tmp_path_factory.mktemp("lens") / "stage2", "qwen2_5_vl_3b")


def test_a_lens_after_stage_2_is_what_pytorch_computes(official, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["from_torch", f"--lens={official}", f"--output={out}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    dropped = {line.removeprefix("dropped ") for line in printed if line.startswith("dropped ")}
    assert dropped == {"lm_head.weight", *(f"sam.{name}" for name in build.MEMORY)}
    config = checkpoints.read_config(out)
    assert (config["context_positions"], config["coordinates"]) == ("text", "qwen2p5vl")
    assert main(["verify", f"--checkpoint={out}", f"--torch={official}", "--forward=true"]) == 0
    assert "mask logits" in capsys.readouterr().out
    assert not (out / "training_args.bin").exists()


def test_a_lens_on_qwen2_vl(converted, tmp_path):
    lens = write_lens(tmp_path / "lens", "qwen2_vl_2b")
    from_torch(tmp_path / "out", lens=lens, dtype="float32")
    ours, theirs = tmp_path / "out", converted("qwen2_vl_2b.released")
    mine, other = (read_lens(checkpoints.read_config(d)) for d in (ours, theirs))
    assert mine.mllm == other.mllm and mine.sam == other.sam
    assert checkpoints.read_config(ours)["coordinates"] == "qwen2vl"
    tensors = [
        {name: x for name, x in params(d).items() if name.startswith(("visual/", "language/"))}
        for d in (ours, theirs)
    ]
    same(*tensors)


def test_the_sam_of_a_lens_after_stage_1_is_never_taken(genuine, tmp_path, capsys):
    """Its sam.* is as it was made: norms 1 and 0, the rest random."""
    made = {
        f"sam.{name}": np.full_like(x, name.endswith(".weight"))
        for name, x in build.meta_tensors(SAM).items()
        if "norm" in name or "output_upscaling.1" in name or "mask_downscaling.1" in name
    }
    lens = write_lens(tmp_path / "lens", "qwen2_5_vl_3b", made)
    arguments = ["from_torch", f"--lens={lens}", f"--output={tmp_path / 'out'}"]
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and "was never trained" in errors and "--sam" in errors
    assert main([*arguments, f"--sam={genuine(SAM)}"]) == 0
    true, norm = build.meta_tensors(SAM), "sam_mask_decoder.transformer.norm_final_attn"
    ours = params(tmp_path / "out")[f"sam/{norm.replace('.', '/')}/scale"]
    np.testing.assert_array_equal(ours, true[f"{norm}.weight"])


# --- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sam"),
    [
        ("qwen2_5_vl_3b.released", SAM),
        ("qwen2_5_vl_3b.transformers_4.52.4", "sam2.1.transformers_4.57.1"),
        ("qwen2_vl_2b.transformers_4.46.3", SAM),
        ("qwen2_vl_7b.transformers_5.24.0", "sam1.transformers_5.24.0"),
    ],
)
def test_what_is_exported_loads_where_it_came_from(converted, genuine, tmp_path, name, sam):
    checkpoint, family = converted(name, sam), name.split(".")[0]
    release = genuine(f"{family}.released")
    to_torch(checkpoint, "hf", tmp_path / "hf")
    ours = our_logits(lens(converted(f"{family}.released")))
    assert mllm_class(tmp_path / "hf" / "mllm") is mllm_class(release)
    close(ours, their_logits(tmp_path / "hf" / "mllm", release))
    model_class = transformers.SamModel if sam.startswith("sam1") else transformers.Sam2Model
    token = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    drawn = (their_masks(d, model_class, token) for d in (tmp_path / "hf" / "sam", genuine(sam)))
    # Not to the bit: Hugging Face's SAM 1 says another epsilon than Meta's code, and ours, has.
    close(*drawn)

    to_torch(checkpoint, "lens", tmp_path / "lens")
    config = json.loads((tmp_path / "lens" / "config.json").read_text())
    assert None not in (config["image_token_id"], config["video_token_id"])
    from_torch(tmp_path / "again", lens=tmp_path / "lens")
    same(params(tmp_path / "again"), params(checkpoint))
    mine, theirs = (checkpoints.read_config(d) for d in (tmp_path / "again", checkpoint))
    assert read_lens(mine) == read_lens(theirs)


# --- what is contradictory or missing -------------------------------------------------------------

BACKBONE = "vision_config.backbone_config"
MLLM = {
    "another number of layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the we"),
    "another width": (
        {"intermediate_size": 64},
        "intermediate_size is 64, but the weights have 48",
    ),
    "another depth": ({"vision_config.depth": 4}, "vision_config.depth is 4, but the weights have"),
    "more keys and values": ({"num_key_value_heads": 4}, "num_key_value_heads is 32, but the we"),
    "another family": (
        {
            "model_type": "qwen2_vl",
            "vision_config": build.record("qwen2_vl_2b.released")["files"]["config.json"][
                "vision_config"
            ],
        },
        "vision_config is that of Qwen2-VL, but the weights have that of Qwen2.5-VL",
    ),
}
SAM_CONFIG = {
    "another stride": ({f"{BACKBONE}.query_stride": [4, 4]}, f"{BACKBONE}.query_stride = [4, 4]"),
    "uneven heads": (
        {f"{BACKBONE}.num_attention_heads_per_stage": [2, 2, 4, 4]},
        f"{BACKBONE}.num_attention_heads_per_stage = [2, 2, 4, 4], but",
    ),
    "another side": (
        {"prompt_encoder_config.image_size": 128},
        "prompt_encoder_config.image_size = 128 contradicts image_size = 64",
    ),
    "another width": (
        {f"{BACKBONE}.embed_dim_per_stage": [16, 32, 64, 128]},
        f"{BACKBONE}.embed_dim_per_stage = [16, 32, 64, 128], but",
    ),
    "more blocks": (
        {f"{BACKBONE}.blocks_per_stage": [1, 2, 3, 1]},
        f"the sum of {BACKBONE}.blocks_per_stage is 7, but the weights have 5",
    ),
    "one mask only": (
        {"mask_decoder_config.dynamic_multimask_via_stability": False},
        "mask_decoder_config.dynamic_multimask_via_stability = False is not supported",
    ),
    "a newer model": ({"model_type": "sam3_tracker"}, "model_type 'sam3_tracker' is none of sam2"),
    "no section": ({"vision_config": None}, "the key 'vision_config' is missing"),
}


def refused(capsys, mllm: Path, sam: Path, out: Path) -> str:
    capsys.readouterr()
    assert main(["from_torch", f"--mllm={mllm}", f"--sam={sam}", f"--output={out}"]) == 2
    [error] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert not out.exists()
    return error


@pytest.mark.parametrize("case", MLLM)
def test_a_config_that_contradicts_the_weights(genuine, tmp_path, capsys, case):
    changes, expected = MLLM[case]
    shutil.copytree(genuine("qwen2_5_vl_3b.released"), tmp_path / "mllm")
    build.edit(tmp_path / "mllm" / "config.json", **changes)
    error = refused(capsys, tmp_path / "mllm", genuine(SAM), tmp_path / "out")
    assert f"{tmp_path / 'mllm' / 'config.json'}: " in error and expected in error


@pytest.mark.parametrize("case", SAM_CONFIG)
def test_a_config_of_sam_that_is_of_something_else(genuine, tmp_path, capsys, case):
    changes, expected = SAM_CONFIG[case]
    shutil.copytree(genuine(SAM), tmp_path / "sam")
    build.edit(tmp_path / "sam" / "config.json", **changes)
    release = genuine("qwen2_5_vl_3b.released")
    error = refused(capsys, release, tmp_path / "sam", tmp_path / "out")
    assert f"{tmp_path / 'sam' / 'config.json'}: " in error and expected in error


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_a_sam_that_normalises_pictures_otherwise(genuine, tmp_path, capsys, file):
    version = "4.57.1" if file.startswith("pre") else "5.24.0"
    shutil.copytree(genuine(f"sam2.1.transformers_{version}"), tmp_path / "sam")
    key = "image_mean" if file.startswith("pre") else "image_processor.image_mean"
    build.edit(tmp_path / "sam" / file, **{key: [0.5, 0.5, 0.5]})
    release = genuine("qwen2_5_vl_3b.released")
    error = refused(capsys, release, tmp_path / "sam", tmp_path / "out")
    assert f"{tmp_path / 'sam' / file}: image_mean is [0.5, 0.5, 0.5]" in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        ("<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_a_download_that_is_not_the_file(genuine, tmp_path, capsys, content, expected):
    shutil.copytree(genuine("qwen2_5_vl_3b.released"), tmp_path / "mllm")
    file = tmp_path / "mllm" / "model-00002-of-00002.safetensors"
    file.write_text(content)
    error = refused(capsys, tmp_path / "mllm", genuine(SAM), tmp_path / "out")
    assert f"{file}: is " in error and expected in error
    file = tmp_path / "sam2_hiera_large.pt"
    file.write_text(content)
    release = genuine("qwen2_5_vl_3b.released")
    assert f"{file}: is " in refused(capsys, release, file, tmp_path / "out")


def test_an_index_left_over_from_an_earlier_save(genuine, converted, tmp_path):
    """Of shards that are gone: transformers looks for model.safetensors first."""
    shutil.copytree(genuine("qwen2_5_vl_3b.transformers_4.52.4"), tmp_path / "mllm")
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "gone.safetensors"}}
    (tmp_path / "mllm" / "model.safetensors.index.json").write_text(json.dumps(index))
    from_torch(tmp_path / "out", mllm=tmp_path / "mllm", sam=genuine(SAM), num_queries=5)
    same(params(tmp_path / "out"), params(converted("qwen2_5_vl_3b.transformers_4.52.4")))
