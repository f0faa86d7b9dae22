"""SAM 1 against transformers' SamModel on random tiny weights, forward and gradients."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict

from lens_jax.convert_weights.sam1 import HF_MATRIX_AGAIN, hf_source, recognise, table
from lens_jax.convert_weights.table import WeightsError, params_from, tensors_from
from lens_jax.model_configs.sam import read_sam, read_sam1, write_sam, write_sam1
from lens_jax.models.layers import shapes_of
from lens_jax.models.sam.config import SAM_PRESETS, Sam2Config, SamConfig
from lens_jax.models.sam.segmenter import Sam1
from tests import micro
from tests.models import segmenters
from tests.models.segmenters import (
    KINDS,
    B,
    G,
    close,
    hf_inputs,
    hf_pixels,
    our_prompts,
    perturb,
    same_gradients,
    to_numpy,
)

torch = pytest.importorskip("torch")

# Windows of 3 cells do not divide the map of 8: the last ones reach beyond it.
CONFIG = dataclasses.replace(
    micro.WITH_SAM1.sam,
    image_size=128,
    embed_dim=24,
    depth=3,
    num_heads=3,
    d_model=32,
    decoder_depth=2,
    decoder_heads=4,
    iou_head_depth=3,
)


def original_names(config: SamConfig, tensors: dict) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under the original names; every one of them must have a place."""
    names = {entry.source: hf_source(config, entry.source)[0] for entry in table(config).entries}
    assert len(set(names.values())) == len(names)
    assert set(tensors) - set(names.values()) == {HF_MATRIX_AGAIN}
    return {original: tensors[name] for original, name in names.items()}


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = transformers.SamModel(transformers.SamConfig(**write_sam1(CONFIG)))
    theirs.shared_image_embedding.requires_grad_(False)
    perturb(theirs)
    theirs.prompt_encoder.shared_embedding = theirs.shared_image_embedding
    model = shapes_of(lambda rngs: Sam1(CONFIG, rngs=rngs))
    tensors = original_names(CONFIG, to_numpy(theirs.state_dict()))
    nnx.update(model, params_from(table(CONFIG), tensors))
    return theirs.eval(), model


def external(seed: int = 4) -> np.ndarray:
    """One sparse token a prompt that no prompt encoder made, as LENS brings it."""
    return np.random.default_rng(seed).standard_normal((B, G, 1, CONFIG.d_model)).astype("f4")


def test_forward(pair):
    """Image features, all masks and their predicted quality, for every kind of prompt."""
    theirs, model = pair
    images, prompts = segmenters.images(), segmenters.prompts()

    @nnx.jit
    def run(model, images):
        features = model.encode(images)
        sparse_dense = {kind: our_prompts(model, prompts, kind) for kind in KINDS}
        sparse_dense["external"] = external(), None
        return features, {
            kind: model.decode(features, *embedded, stability=False)
            for kind, embedded in sparse_dense.items()
        }

    features, masks = run(model, images)
    assert features.high_res is None
    with torch.no_grad():
        embeddings = theirs.get_image_embeddings(hf_pixels(images))
        close(features.image_embed, embeddings.permute(0, 2, 3, 1))
        for kind in KINDS:
            for multimask in (False, True):
                expected = theirs(
                    image_embeddings=embeddings,
                    **hf_inputs(prompts, kind),
                    multimask_output=multimask,
                )
                chosen = slice(1, None) if multimask else slice(0, 1)
                close(masks[kind].all_logits[:, :, chosen], expected.pred_masks)
                close(masks[kind].iou[..., chosen], expected.iou_scores)
            assert np.min(masks[kind].iou) < 0  # no sigmoid hides it
        _, dense = theirs.prompt_encoder(None, None, None, None)
        expected, _ = theirs.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=theirs.get_image_wide_positional_embeddings().repeat(
                B, 1, 1, 1
            ),
            sparse_prompt_embeddings=torch.from_numpy(external()),
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    close(masks["external"].logits, expected[:, :, 0])


def test_the_mask_is_token_0s(pair):
    """In evaluation too: the rule that replaces unstable masks is SAM 2's."""
    _, model = pair
    images = segmenters.images()

    @nnx.jit
    def run(model, images, scale):
        return model.decode(model.encode(images), scale * external(), stability=True)

    for scale in (0.1, 10):
        masks = run(model, images, scale)
        np.testing.assert_array_equal(masks.logits, masks.all_logits[:, :, 0])
        assert not np.asarray(masks.selected_token).any()
        assert masks.object_score is None and masks.stability is None


def test_gradients(pair):
    theirs, model = pair
    images, prompts = segmenters.images(), segmenters.prompts()
    kinds = ("points", "boxes", "points_mask")
    weight = np.random.default_rng(2).standard_normal((3, B, G, 4, 32, 32)).astype(np.float32)
    embeddings = theirs.vision_encoder(hf_pixels(images))[0]
    loss = 0
    for kind, w in zip(kinds, weight, strict=True):
        outputs = [
            theirs(
                image_embeddings=embeddings, **hf_inputs(prompts, kind), multimask_output=multimask
            )
            for multimask in (False, True)
        ]
        logits = torch.cat([out.pred_masks for out in outputs], dim=2)
        iou = torch.cat([out.iou_scores for out in outputs], dim=2)
        loss = loss + (torch.tanh(logits) * torch.from_numpy(w)).mean() + iou.square().mean()
    loss.backward()
    expected = original_names(
        CONFIG,
        {
            name: np.zeros(x.shape, "f4") if x.grad is None else x.grad.numpy()
            for name, x in theirs.named_parameters(remove_duplicate=False)
        },
    )

    @nnx.jit
    def gradients(model, images):
        def loss(model):
            features, value = model.encode(images), 0
            for kind, w in zip(kinds, weight, strict=True):
                sparse, dense = our_prompts(model, prompts, kind)
                masks = model.decode(features, sparse, dense, stability=False)
                value += jnp.mean(jnp.tanh(masks.all_logits) * w) + jnp.mean(masks.iou**2)
            return value

        return nnx.grad(loss)(model)

    ours = tensors_from(table(CONFIG), nnx.to_pure_dict(gradients(model, images)))
    same_gradients(ours, expected)
    for name in ("rel_pos_h", "rel_pos_w", "pos_embed", "no_mask_embed", "mask_downscaling.6"):
        assert any(name in key and np.abs(x).max() > 0 for key, x in expected.items()), name


def test_bfloat16_stays_near_float32(pair):
    _, full = pair
    half = shapes_of(lambda rngs: Sam1(CONFIG, rngs=rngs, dtype=jnp.bfloat16))
    nnx.update(half, nnx.state(full))
    encode = nnx.jit(lambda m, x: m.encode(x).image_embed)
    a, b = (encode(m, segmenters.images()) for m in (full, half))
    assert b.dtype == jnp.bfloat16
    assert np.corrcoef(np.ravel(a), np.ravel(b.astype(np.float32)))[0, 1] > 0.99


# Parameters that the original code counts; it keeps the matrix of positions as a buffer.
PUBLISHED = {"vit_b": 93_735_472, "vit_l": 312_342_832, "vit_h": 641_090_608}


@pytest.mark.compiled
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = SAM_PRESETS[name]
    model = shapes_of(lambda rngs: Sam1(config, rngs=rngs))
    ours = {
        "/".join(map(str, path)): x.shape
        for path, x in flatten_dict(nnx.to_pure_dict(nnx.state(model))).items()
    }
    assert sum(map(np.prod, ours.values())) == PUBLISHED[name] + 2 * config.d_model // 2
    with torch.device("meta"):
        theirs = transformers.SamModel(transformers.SamConfig(**write_sam1(config))).state_dict()
    shapes = {}
    for entry in table(config).entries:
        shapes[entry.source] = entry.transform.source_shape(ours[entry.target.partition("/")[2]])
        assert shapes[entry.source] == tuple(theirs.pop(hf_source(config, entry.source)[0]).shape)
    assert set(theirs) == {HF_MATRIX_AGAIN}
    assert len(shapes) == len(ours)
    assert recognise(shapes) == config


def test_transformers_defaults_are_vit_b():
    """What a file of Hugging Face's leaves out."""
    theirs = transformers.SamConfig().to_dict()
    assert read_sam1(theirs) == SAM_PRESETS["vit_b"]
    theirs["vision_config"] = {"hidden_size": 1024, "num_hidden_layers": 24}
    theirs["vision_config"] |= {"num_attention_heads": 16, "global_attn_indexes": [5, 11, 17, 23]}
    assert read_sam1(theirs) == SAM_PRESETS["vit_l"]


def test_config_round_trip_and_errors():
    assert read_sam(write_sam1(CONFIG)) == CONFIG
    assert isinstance(read_sam(write_sam(Sam2Config())), Sam2Config)
    with pytest.raises(ValueError, match=r"model_type 'sam3' is none of sam, sam2"):
        read_sam({"model_type": "sam3"})

    def changed(section, **values):
        config = write_sam1(CONFIG)
        return config | {section: config[section] | values}

    for config, message in (
        (write_sam1(CONFIG) | {"model_type": "sam2"}, "'sam2' is not that of SAM 1"),
        (changed("vision_config", use_rel_pos=False), r"vision_config\.use_rel_pos = False"),
        (changed("mask_decoder_config", hidden_size=64), r"mask_decoder_config\.hidden_size = 64"),
        (
            changed("vision_config", image_size=120),
            r"image_size = 128 contradicts vision_config\.image_size = 120",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_sam1(config)
    with pytest.raises(ValueError, match="image_size 120 must be a multiple of 16"):
        dataclasses.replace(CONFIG, image_size=120)
    with pytest.raises(ValueError, match="multiple of the 5 heads"):
        dataclasses.replace(CONFIG, num_heads=5)
    with pytest.raises(ValueError, match=r"\[3\] are none of 3 blocks"):
        dataclasses.replace(CONFIG, global_attn_indexes=(1, 3))
    shapes = {"image_encoder.pos_embed": (1, 8, 8, 24)}
    with pytest.raises(WeightsError, match=r"sam_config\.json"):
        recognise(shapes)
    with pytest.raises(WeightsError, match="holds no SAM 1"):
        recognise({})
