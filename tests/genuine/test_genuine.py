"""Genuine directories convert and predict what their own code does, and go back where they came."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from lens_jax import Lens, checkpoints
from lens_jax.data.prompts import Templates
from lens_jax.models.lens import LensConfig
from lens_jax.models.qwen_vl.config import PRESETS, QwenVLConfig
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.sam.config import PRESETS as SAM2_PRESETS
from lens_jax.models.sam.config import SAM_PRESETS, SamConfig
from lens_jax.models.sam.segmenter import PIXEL_MEAN, PIXEL_STD
from tests.genuine import build
from tests.genuine.conftest import SAM
from tools.convert_weights import from_torch, sam2, to_torch
from tools.convert_weights.__main__ import main

RELEASED = ("qwen2_5_vl_3b", "qwen2_vl_2b", "qwen2_vl_7b")
SAVED_AGAIN = sorted(
    file.stem for file in build.ARTEFACTS.glob("qwen*.json") if ".released" not in file.name
)
SAMS = sorted(file.stem for file in build.ARTEFACTS.glob("sam*.json"))
QUESTION = "red circle on the left"
COMPLETION = "(12,8),(40,36)"
TOLERANCE = 1e-3  # of the largest value, as `verify --forward true` has it


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def params(checkpoint: Path) -> dict[str, np.ndarray]:
    return dict(checkpoints.iterate_params(checkpoint))


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], but: tuple[str, ...] = ()):
    ours, theirs = (
        {name: x for name, x in tensors.items() if not name.startswith(but)}
        for tensors in (ours, theirs)
    ) if but else (ours, theirs)
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


def fed(model: Lens) -> dict[str, np.ndarray]:
    """What the model is fed with the picture and the question."""
    prompts = model.processor.prompts([picture()], [QUESTION])
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
    mine, theirs = (LensConfig.from_dict(checkpoints.read_config(d)) for d in (ours, release))
    assert mine == theirs
    a, b = (fed(lens(directory)) for directory in (ours, release))
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
        assert QwenVLConfig.from_hf(config) == PRESETS[model], form


def test_the_7b_has_a_head_of_its_own_in_every_form():
    first, *rest = map(QwenVLConfig.from_hf, published("Qwen2-VL-7B-Instruct").values())
    assert (first.vocab_size, first.tie_word_embeddings, first.hidden_size) == (152064, False, 3584)
    assert first.vision.out_hidden_size == 3584 and first.vision.depth == 32
    assert all(config == first for config in rest)


def published(name: str) -> dict[str, dict]:
    """A published model's config.json: as released, and by the version that saved it again."""
    return json.loads((build.ARTEFACTS / "published_configs.json").read_text())[name]


# --- SAM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMS)
def test_masks_are_those_of_transformers(converted, genuine, name):
    model = lens(converted("qwen2_5_vl_3b.released", name))
    model_class = transformers.SamModel if name.startswith("sam1") else transformers.Sam2Model
    token = model.context_embedding(picture(), QUESTION, COMPLETION)
    ours = model.mask_logits(picture(), QUESTION, COMPLETION)
    close(ours, their_masks(genuine(name), model_class, token))


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
    from_torch(
        tmp_path / "again", mllm=release, sam=tmp_path, dtype="float32", num_queries=5
    )
    same(params(tmp_path / "again"), params(tmp_path / "out"))


def test_published_sams_are_told_by_their_config():
    for size, preset in SAM2_PRESETS.items():
        for config in published(f"sam2.1-hiera-{size.replace('_', '-')}").values():
            assert sam2.config_from_hf(config) == preset
    for size, preset in (("base", "vit_b"), ("large", "vit_l"), ("huge", "vit_h")):
        for config in published(f"sam-vit-{size}").values():
            assert SamConfig.from_dict(config) == SAM_PRESETS[preset]
