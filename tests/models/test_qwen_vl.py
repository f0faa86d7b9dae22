"""Qwen2-VL and Qwen2.5-VL against transformers, on random tiny weights: forward and gradients."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from lens_jax import checkpoints
from lens_jax.convert_weights import parameter_shapes
from lens_jax.convert_weights.qwen_vl import official_name, table
from lens_jax.model_configs.qwen_vl import read_qwen_vl, write_qwen_vl
from lens_jax.models.layers import shapes_of
from lens_jax.models.lens import abstract, split_policy
from lens_jax.models.qwen_vl.config import PRESETS, QwenVLConfig
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.qwen_vl.language import LanguageModel
from lens_jax.models.qwen_vl.vision import VisionTower
from tests import micro

torch = pytest.importorskip("torch")

# 84 x 140 pixels and 112 x 84 are no multiples of either window.
ROWS = [((6, 10), (3, 6)), ((8, 6), (1, 2)), ((4, 4), (5, 4))]


def qwen2(tied):
    """Qwen2-VL's tower, its windows wider than every picture but one."""
    vision = dataclasses.replace(
        micro.QWEN2_VL.mllm.vision, depth=3, full_attention_blocks=(0, 1, 2)
    )
    return changed(micro.QWEN2_VL, tied, vision)


def qwen2_5(tied, window, full):
    vision = dataclasses.replace(
        micro.CONFIG.mllm.vision, depth=3, window_size=window, full_attention_blocks=full
    )
    return changed(micro.CONFIG, tied, vision)


def changed(config, tied, vision):
    mllm = dataclasses.replace(config.mllm, tie_word_embeddings=tied, vision=vision)
    return dataclasses.replace(config, mllm=mllm)


def hf_model(mllm: QwenVLConfig) -> torch.nn.Module:
    model, config = {
        "qwen2_vl": (Qwen2VLForConditionalGeneration, Qwen2VLConfig),
        "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
    }[mllm.vision.family]
    model = model(config(**write_qwen_vl(mllm))).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = x[0].numel() ** -0.5 if x.ndim > 1 else 0.2
            if "patch_embed" in name:
                scale *= 0.01  # so that the first norm's epsilon tells
            x.copy_(torch.randn_like(x) * scale + ("norm" in name or "ln_q" in name) * (x.ndim < 2))
    return model


def official(tensors) -> dict[str, np.ndarray]:
    return {official_name(name): x.detach().numpy() for name, x in tensors}


def hf_batch(rows, side):
    length = max(len(r.tokens) for r in rows)
    pad = lambda x: (  # noqa: E731
        np.pad(x, (0, length - len(x)) if side == "right" else (length - len(x), 0))
    )
    ids = torch.tensor(np.stack([pad(r.tokens) for r in rows])).long()
    mask = torch.tensor(np.stack([pad(np.ones(len(r.tokens), np.int64)) for r in rows]))
    return dict(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.tensor(np.concatenate([r.patches for r in rows])),
        image_grid_thw=torch.tensor([(1, *r.grid) for r in rows]),
        mm_token_type_ids=(ids == micro.CONFIG.mllm.image_token_id).int(),
    )


def tokens_only(x, rows, side):
    """[B, P, ...] without padding, all rows in one."""
    ends = [len(r.tokens) for r in rows]
    take = (lambda y, n: y[:n]) if side == "right" else (lambda y, n: y[len(y) - n :])
    return [take(y, n) for y, n in zip(x, ends, strict=True)]


@pytest.mark.parametrize(
    ("ours", "side"),
    [
        (qwen2(tied=True), "left"),
        (qwen2(tied=False), "right"),
        (qwen2_5(True, 56, (1,)), "right"),
        (qwen2_5(False, 112, (0,)), "left"),
        (qwen2_5(True, 56, (0, 2)), "left"),
    ],
    ids=["qwen2", "qwen2-untied", "full-1", "untied-full-0", "full-0-2"],
)
def test_parity(ours, side):
    tied = ours.mllm.tie_word_embeddings
    theirs = hf_model(ours.mllm)
    assert read_qwen_vl(theirs.config.to_dict()) == ours.mllm
    tensors = official(theirs.state_dict().items())
    if tied:
        tensors.pop("lm_head.weight", None)
    entries = table(ours.mllm).entries
    assert {e.source for e in entries} == set(tensors)
    definition, policy, rest = split_policy(abstract(ours))
    params = {e.target: e.transform.forward(tensors[e.source]) for e in entries}
    nnx.replace_by_pure_dict(policy, checkpoints.stack(params))

    rows = [micro.row(ours, grid, text, i) for i, (grid, text) in enumerate(ROWS)]
    prompts = micro.collate(ours, rows)
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((*prompts.tokens.shape, ours.mllm.vocab_size)).astype("f4")
    mask = np.arange(weights.shape[1]) < prompts.length[:, None]
    weights *= mask[..., None]

    @jax.jit
    def forward_and_gradients(policy):
        def weighted(policy):
            model = nnx.merge(definition, policy, rest)
            embedded = model.embed(prompts)
            hidden, _ = model.language.prefill(embedded, prompts.positions, mask)
            z = logits(hidden, model.language.head)
            return (z * weights).sum(), z

        gradients, z = jax.grad(weighted, has_aux=True)(policy)
        return z, gradients

    z, gradients = forward_and_gradients(policy)
    expected = theirs(**hf_batch(rows, side)).logits
    aligned = tokens_only(expected, rows, side)
    for got, want in zip(tokens_only(z, rows, "right"), aligned, strict=True):
        micro.close(got, want.detach().numpy())

    kept = tokens_only(torch.tensor(weights), rows, "right")
    sum((x * w).sum() for x, w in zip(aligned, kept, strict=True)).backward()
    theirs_by_name = official((n, x.grad) for n, x in theirs.named_parameters())
    flat = dict(checkpoints.unstack(nnx.to_pure_dict(gradients)))
    ours_by_name = {e.source: e.transform.inverse(flat[e.target]) for e in entries}
    micro.same_gradients(ours_by_name, theirs_by_name)


SIZES = {  # hidden, MLP, layers, heads, KV heads, vocabulary, tied, vision MLP, parameters
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3_754_622_976),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8_292_166_656),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33_452_718_336),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73_410_777_344),
}


def parameters(mllm: QwenVLConfig) -> int:
    parts = (
        shapes_of(lambda rngs: VisionTower(mllm.vision, rngs=rngs)),
        shapes_of(lambda rngs: LanguageModel(mllm, rngs=rngs)),
    )
    return sum(int(np.prod(x.shape)) for part in parts for x in jax.tree.leaves(nnx.state(part)))


@pytest.mark.compiled
@pytest.mark.parametrize("size", SIZES)
def test_published_shapes(size):
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied, vision_mlp, count = SIZES[size]
    mllm = read_qwen_vl(
        dict(
            model_type="qwen2_5_vl",
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
            image_token_id=151655,
            vision_config=dict(
                depth=32,
                hidden_size=1280,
                intermediate_size=vision_mlp,
                num_heads=16,
                in_chans=3,
                out_hidden_size=hidden,
                patch_size=14,
                spatial_merge_size=2,
                temporal_patch_size=2,
                window_size=112,
                fullatt_block_indexes=[7, 15, 23, 31],
            ),
        )
    )
    assert mllm.head_dim == 128 and sum(mllm.mrope_section) == 64
    assert mllm.vision.window_patches == 64 and mllm.vision.patch_dim == 1176
    assert parameters(mllm) == count
    assert mllm == PRESETS.get(f"Qwen2.5-VL-{size}-Instruct", mllm)


QWEN2_SIZES = {  # hidden, MLP, layers, heads, KV heads, vocabulary, tied, parameters
    "2B": (1536, 8960, 28, 12, 2, 151936, True, 2_208_985_600),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 8_291_375_616),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 73_405_560_320),
}


def published_qwen2(size):
    """config.json as Qwen publishes it."""
    hidden, mlp, layers, heads, kv_heads, vocabulary, tied, _ = QWEN2_SIZES[size]
    return dict(
        architectures=["Qwen2VLForConditionalGeneration"],
        model_type="qwen2_vl",
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        hidden_act="silu",
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
        image_token_id=151655,
        vision_config=dict(
            depth=32,
            embed_dim=1280,
            mlp_ratio=4,
            num_heads=16,
            in_chans=3,
            hidden_size=hidden,
            patch_size=14,
            spatial_merge_size=2,
            spatial_patch_size=14,
            temporal_patch_size=2,
        ),
    )


@pytest.mark.compiled
@pytest.mark.parametrize("size", QWEN2_SIZES)
def test_published_shapes_of_qwen2(size):
    mllm = read_qwen_vl(published_qwen2(size))
    assert mllm.head_dim == 128 and sum(mllm.mrope_section) == 64
    assert (mllm.vision.hidden_size, mllm.vision.intermediate_size) == (1280, 5120)
    assert mllm.vision.full_attention_blocks == tuple(range(32))
    assert mllm.vision.window_patches == 64 and mllm.vision.patch_dim == 1176
    assert parameters(mllm) == QWEN2_SIZES[size][-1]
    assert mllm == PRESETS.get(f"Qwen2-VL-{size}-Instruct", mllm)


@pytest.mark.compiled
@pytest.mark.parametrize("size", ["2B", "7B"])
def test_the_table_is_the_published_model(size):
    """Names and shapes of transformers' own model."""
    hf = published_qwen2(size)
    mllm = read_qwen_vl(hf)
    with torch.device("meta"):
        theirs = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**hf)).state_dict()
    shapes = {official_name(name): tuple(x.shape) for name, x in theirs.items()}
    if mllm.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    lens = dataclasses.replace(micro.CONFIG, mllm=mllm)
    targets = parameter_shapes(lens)
    ours = {e.source: e.transform.source_shape(targets[e.target]) for e in table(mllm).entries}
    assert ours == shapes


@pytest.mark.parametrize("size", QWEN2_SIZES)
def test_both_forms_of_a_config_say_the_same(size, tmp_path):
    """As published, and nested, as newer versions of transformers save it."""
    published = published_qwen2(size)
    Qwen2VLConfig(**published).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in nested
    assert read_qwen_vl(nested) == read_qwen_vl(published)
    del published["vision_config"]["hidden_size"]  # some versions leave it out where it is 3584
    assert read_qwen_vl(nested) == read_qwen_vl(published)


def test_families_are_told_apart_by_their_vision_tower():
    """LENS saves Qwen2.5-VL under the other family's model_type, with that one's defaults."""
    lens = write_qwen_vl(micro.CONFIG.mllm) | {"model_type": "qwen2_vl"}
    lens["vision_config"] |= {"embed_dim": 1280, "mlp_ratio": 4}
    assert read_qwen_vl(lens) == micro.CONFIG.mllm
    plain = write_qwen_vl(micro.QWEN2_VL.mllm)
    assert read_qwen_vl(plain) == micro.QWEN2_VL.mllm
    assert read_qwen_vl(plain | {"model_type": "qwen2_vl"}) == micro.QWEN2_VL.mllm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is qwen2_5_vl, but .* Qwen2-VL"),
        ({"out_hidden_size": 32}, "has out_hidden_size but no fullatt_block_indexes"),
        ({"window_size": 112}, "has window_size but no fullatt_block_indexes"),
        ({"embed_dim": None}, "neither embed_dim and mlp_ratio, as Qwen2-VL, nor"),
        ({"hidden_size": 48}, "48 wide, the language model's 32"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"depth": None}, "no key 'depth', which Qwen2-VL needs"),
    ],
)
def test_a_contradicting_config_is_one_clear_error(change, message):
    hf = write_qwen_vl(micro.QWEN2_VL.mllm)
    for key, value in change.items():
        part = hf if key == "model_type" else hf["vision_config"]
        part[key] = value
        if value is None:
            del part[key]
    with pytest.raises(ValueError, match=message) as caught:
        read_qwen_vl(hf)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["fullatt_block_indexes", "num_key_value_heads", "image_token_id"])
def test_a_missing_key_is_named(key):
    hf = write_qwen_vl(micro.CONFIG.mllm)
    for part in (hf, hf["text_config"], hf["vision_config"]):
        part.pop(key, None)
    with pytest.raises(ValueError, match=key):
        read_qwen_vl(hf)


def released(**changes):
    """config.json of Qwen2.5-VL-3B-Instruct as released, with changes; `a.b` is key b of a."""
    hf = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 2048,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 151936,
    }
    for name, value in changes.items():
        *parts, key = name.split("__")
        section = hf
        for part in parts:
            section = section.setdefault(part, {})
        section[key] = value
    return hf


PUBLISHED = PRESETS["Qwen2.5-VL-3B-Instruct"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_config": None, "rope_parameters": None, "quantization_config": None},
        {"text_config__image_token_id": None, "text_config__hidden_size": None},
        {"text_config__tie_word_embeddings": False},
        {"tie_word_embeddings": None, "text_config__tie_word_embeddings": True},
        {"text_config__layer_types": ["full_attention"] * 36},
        {"text_config__rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        {"attention_bias": False, "head_dim": 128},
        {"hidden_size": None, "text_config__hidden_size": 2048},
        {"rope_scaling__rope_type": "default"},
        {"image_token_id": None},
        {"vision_config__rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}},
    ],
)
def test_what_says_the_same_is_read_the_same(changes):
    assert read_qwen_vl(released(**changes)) == PUBLISHED


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling__rope_type": "yarn"}, "rope_scaling: rope_type is yarn"),
        ({"rope_scaling__type": "linear"}, "rope_scaling: type is linear"),
        ({"text_config__rope_parameters": {"rope_type": "dynamic"}}, "rope_type is dynamic"),
        ({"rope_scaling__mrope_interleaved": True}, "mrope_interleaved is True"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"text_config__use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "holds sliding_attention"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"vision_config__hidden_act": "gelu_pytorch_tanh"}, "hidden_act is gelu_pytorch_tanh"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantised"),
        ({"model_type": "qwen3_vl"}, "model_type is qwen3_vl"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"rope_scaling__mrope_section": [16, 24, 23]}, "mrope_section .*128"),
        ({"text_config__rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-06, but 1e-05 in text_config"),
        ({"text_config__rope_theta": 1e4}, "rope_theta is 1000000.0, but 10000.0 in text_config"),
        ({"text_config__image_token_id": 7}, "image_token_id is 151655, but 7 in text_config"),
        ({"num_hidden_layers": "36"}, "num_hidden_layers: expected a positive whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive whole number"),
        ({"num_attention_heads": 17}, "no multiple of num_attention_heads 17"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false"),
        ({"vision_config": [1]}, "vision_config: expected a JSON object"),
        ({"vision_config__num_heads": 7}, "no multiple of num_heads 7"),
        ({"vision_config__rope_parameters": {"rope_theta": 1e6}}, "only theta 10000"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_qwen_vl(released(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen2_5_VL"])
def test_left_out_keys_have_the_classes_defaults(name):
    """transformers' own classes say what they are."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")()
    text, vision = theirs.text_config, theirs.vision_config
    kind = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl"}[name]
    ours = read_qwen_vl({"model_type": kind, "text_config": {"model_type": "x"}})
    assert ours.num_heads == text.num_attention_heads and ours.vocab_size == text.vocab_size
    assert (ours.num_layers, ours.num_kv_heads) == (text.num_hidden_layers, 8)
    assert (ours.hidden_size, ours.intermediate_size) == (text.hidden_size, text.intermediate_size)
    assert (ours.rms_norm_eps, ours.rope_theta) == (text.rms_norm_eps, 1e6)
    assert ours.image_token_id == theirs.image_token_id and not ours.tie_word_embeddings
    assert (ours.vision.depth, ours.vision.num_heads) == (vision.depth, vision.num_heads)
    assert (ours.vision.patch_size, ours.vision.merge_size) == (14, vision.spatial_merge_size)
    if kind == "qwen2_vl":
        assert ours.vision.hidden_size == vision.embed_dim
        assert ours.vision.intermediate_size == vision.embed_dim * vision.mlp_ratio
    else:
        assert ours.vision.window_size == vision.window_size
        assert ours.vision.full_attention_blocks == tuple(vision.fullatt_block_indexes)
        sizes = (ours.vision.hidden_size, ours.vision.intermediate_size)
        assert sizes == (vision.hidden_size, vision.intermediate_size)
