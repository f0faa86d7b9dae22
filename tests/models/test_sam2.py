"""SAM 2 against transformers' Sam2Model on random tiny weights, forward and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lens_jax.convert_weights.sam2 import (
    HF_MATRIX_AGAIN,
    hf_source,
    recognise,
    table,
)
from lens_jax.convert_weights.table import WeightsError, params_from, tensors_from
from lens_jax.model_configs.sam import read_sam2, write_sam2
from lens_jax.models.layers import shapes_of
from lens_jax.models.sam.config import PRESETS, Sam2Config
from lens_jax.models.sam.hiera import bicubic_matrix
from lens_jax.models.sam.mask_decoder import stability_score
from lens_jax.models.sam.segmenter import Sam2
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

BASE = Sam2Config(
    image_size=128,
    embed_dim=8,
    num_heads=2,
    stages=(1, 2, 2, 1),
    global_att_blocks=(4,),
    window_pos_embed_bkg_spatial_size=(5, 7),
    window_spec=(8, 4, 8, 4),
    d_model=32,
    decoder_heads=4,
    decoder_mlp_dim=48,
    iou_head_hidden_dim=24,
)
# Windows of stages 3 and 4 do not divide their maps: padding, also under pooling.
PADDED = dataclasses.replace(BASE, window_spec=(8, 4, 6, 3), global_att_blocks=(2,))


@pytest.fixture(scope="module")
def images():
    return segmenters.images()


@pytest.fixture(scope="module")
def prompts():
    return segmenters.prompts()


def hf_model(config: Sam2Config, seed: int = 0) -> transformers.Sam2Model:
    stages = len(config.stages)
    sizes = write_sam2(config)["feature_sizes"]
    torch.manual_seed(seed)
    model = transformers.Sam2Model(
        transformers.Sam2Config(
            vision_config=transformers.Sam2VisionConfig(
                backbone_config=transformers.Sam2HieraDetConfig(
                    hidden_size=config.embed_dim,
                    num_attention_heads=config.num_heads,
                    image_size=[config.image_size] * 2,
                    window_positional_embedding_background_size=list(
                        config.window_pos_embed_bkg_spatial_size
                    ),
                    blocks_per_stage=list(config.stages),
                    embed_dim_per_stage=list(config.stage_dims),
                    num_attention_heads_per_stage=[config.num_heads * 2**i for i in range(stages)],
                    window_size_per_stage=list(config.window_spec),
                    global_attention_blocks=list(config.global_att_blocks),
                ),
                backbone_channel_list=list(config.stage_dims[::-1]),
                backbone_feature_sizes=sizes,
                fpn_hidden_size=config.d_model,
                fpn_top_down_levels=list(config.fpn_top_down_levels),
            ),
            prompt_encoder_config=transformers.Sam2PromptEncoderConfig(
                hidden_size=config.d_model, image_size=config.image_size, patch_size=16
            ),
            mask_decoder_config=transformers.Sam2MaskDecoderConfig(
                hidden_size=config.d_model,
                mlp_dim=config.decoder_mlp_dim,
                num_hidden_layers=config.decoder_depth,
                num_attention_heads=config.decoder_heads,
                iou_head_depth=config.iou_head_depth,
                iou_head_hidden_dim=config.iou_head_hidden_dim,
            ),
        )
    )
    perturb(model)
    with torch.no_grad():
        model.shared_image_embedding.positional_embedding.copy_(
            model.prompt_encoder.shared_embedding.positional_embedding
        )
    return model.eval()


def original_names(config: Sam2Config, tensors: dict) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under the original names; every one of them must have a place."""
    result, used = {}, set()
    for entry in table(config).entries:
        name, row = hf_source(config, entry.source)
        used.add(name)
        result[entry.source] = tensors[name] if row is None else tensors[name][row : row + 1]
    assert set(tensors) - used <= {HF_MATRIX_AGAIN}
    return result


def ours(config: Sam2Config, tensors: dict[str, np.ndarray]) -> Sam2:
    model = shapes_of(lambda rngs: Sam2(config, rngs=rngs))
    nnx.update(model, params_from(table(config), tensors))
    return model


def random_model(config: Sam2Config, seed: int = 0, dtype=jnp.float32) -> Sam2:
    """A model with weights of every kind; drawn by numpy, as initialisation compiles for long."""
    rng = np.random.default_rng(seed)
    model = shapes_of(lambda rngs: Sam2(config, rngs=rngs, dtype=dtype))

    def draw(path, x):
        values = rng.standard_normal(x.shape).astype(np.float32)
        if x.ndim > 1:
            scale = np.prod(x.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 1.0
            return scale * values
        return (path[-1] == "scale") + np.float32(0.1) * values

    flat = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
    nnx.update(model, unflatten_dict({path: draw(path, x) for path, x in flat.items()}))
    return model


@pytest.fixture(scope="module", params=[BASE, PADDED], ids=["exact", "padded"])
def pair(request):
    theirs = hf_model(request.param)
    return theirs, ours(request.param, original_names(request.param, to_numpy(theirs.state_dict())))


def test_trunk_and_features(pair, images):
    theirs, model = pair
    with torch.no_grad():
        backbone = theirs.vision_encoder.backbone(hf_pixels(images))
        features = theirs.get_image_embeddings(hf_pixels(images))
    stages = nnx.jit(lambda m, x: m.image_encoder.trunk(x))(model, images)
    for stage, expected in zip(stages, backbone.intermediate_hidden_states, strict=True):
        close(stage, expected)
    result = nnx.jit(lambda m, x: m.encode(x))(model, images)
    for x, expected in zip((*result.high_res, result.image_embed), features, strict=True):
        close(x, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_decoder(pair, images, prompts, kind):
    theirs, model = pair
    inputs = hf_inputs(prompts, kind)
    with torch.no_grad():
        multi = theirs(hf_pixels(images), **inputs, multimask_output=True)
        dynamic = theirs(hf_pixels(images), **inputs, multimask_output=False)
        single = theirs.train()(hf_pixels(images), **inputs, multimask_output=False)
        theirs.eval()

    @nnx.jit
    def run(model, images):
        sparse, dense = our_prompts(model, prompts, kind)
        features = model.encode(images)
        return [model.decode(features, sparse, dense, stability=s) for s in (True, False)]

    stable, plain = run(model, images)
    close(plain.all_logits[:, :, 1:], multi.pred_masks)
    close(plain.iou[..., 1:], multi.iou_scores)
    close(plain.object_score, multi.object_score_logits[..., 0])
    close(plain.logits, single.pred_masks[:, :, 0])
    close(plain.iou[..., 0], single.iou_scores[..., 0])
    close(stable.logits, dynamic.pred_masks[:, :, 0])
    assert not np.asarray(plain.selected_token).any()


@pytest.mark.parametrize("kind", ["points", "points_mask"])
def test_gradients(pair, images, prompts, kind):
    theirs, model = pair
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((B, G, 4, 32, 32)).astype(np.float32)
    inputs = hf_inputs(prompts, kind)
    theirs.zero_grad()
    multi = theirs(hf_pixels(images), **inputs, multimask_output=True)
    single = theirs.train()(hf_pixels(images), **inputs, multimask_output=False)
    theirs.eval()
    logits = torch.cat([single.pred_masks, multi.pred_masks], dim=2)
    iou = torch.cat([single.iou_scores, multi.iou_scores], dim=2)
    loss = (torch.tanh(logits) * torch.from_numpy(weight)).mean() + iou.square().mean()
    (loss + multi.object_score_logits.square().mean()).backward()
    expected = original_names(
        model.config,
        {
            name: np.zeros(x.shape, "f4") if x.grad is None else x.grad.numpy()
            for name, x in theirs.named_parameters(remove_duplicate=False)
        }
        | {name: np.zeros(x.shape, "f4") for name, x in theirs.named_buffers()},
    )

    @nnx.jit
    def gradients(model, images):
        def loss(model):
            sparse, dense = our_prompts(model, prompts, kind)
            masks = model.decode(model.encode(images), sparse, dense, stability=False)
            value = jnp.mean(jnp.tanh(masks.all_logits) * weight) + jnp.mean(masks.iou**2)
            return value + jnp.mean(masks.object_score**2)

        return nnx.grad(loss)(model)

    result = tensors_from(table(model.config), nnx.to_pure_dict(gradients(model, images)))
    same_gradients(result, expected)


def test_embed_boxes_are_two_labelled_points():
    model = random_model(BASE)
    boxes = np.array([[[3.0, 5.0, 60.0, 70.0]]], np.float32)
    points = model.sam_prompt_encoder.embed_points(
        boxes.reshape(1, 1, 2, 2), jnp.array([[[2, 3]]]), pad=True
    )
    tokens = model.sam_prompt_encoder.embed_boxes(boxes)
    assert tokens.shape == (1, 1, 2, BASE.d_model)
    np.testing.assert_array_equal(tokens, points[:, :, :2])


@nnx.jit
def segment(model, images, sparse):
    return model.decode(model.encode(images), sparse, stability=False)


def test_prompts_of_a_picture_do_not_see_each_other(images):
    model = random_model(BASE)
    sparse = jax.random.normal(jax.random.key(0), (B, G, 1, BASE.d_model))
    together = segment(model, images, sparse)
    for g in range(G):
        alone = segment(model, images, sparse[:, g : g + 1])
        np.testing.assert_allclose(together.logits[:, g], alone.logits[:, 0], rtol=0, atol=1e-5)


def test_stability_rule():
    """Tokens 1..3 take over exactly where token 0's score is below the threshold."""
    sparse = 3 * jax.random.normal(jax.random.key(1), (1, 24, 1, BASE.d_model))
    images = jax.random.normal(jax.random.key(2), (1, 128, 128, 3))

    def decode(thresh):
        config = dataclasses.replace(BASE, stability_delta=0.05, stability_thresh=thresh)
        model = random_model(config, 3)
        return nnx.jit(lambda m, x: m.decode(m.encode(x), sparse, stability=True))(model, images)

    # The threshold is one of the scores: at equality token 0 stays.
    thresh = float(np.sort(decode(0.98).stability, axis=None)[12])
    masks = decode(thresh)
    logits, selected = np.asarray(masks.all_logits), np.asarray(masks.selected_token)
    inner, outer = (logits[:, :, 0] > 0.05).sum((2, 3)), (logits[:, :, 0] > -0.05).sum((2, 3))
    score = np.where(outer > 0, inner / np.maximum(outer, 1), 1.0).astype(np.float32)
    np.testing.assert_array_equal(masks.stability, score)
    best = 1 + np.asarray(masks.iou)[..., 1:].argmax(-1)
    np.testing.assert_array_equal(selected, np.where(score >= np.float32(thresh), 0, best))
    assert 0 < (selected == 0).sum() <= 12
    assert selected.ravel()[np.argsort(score, axis=None, kind="stable")[12]] == 0
    np.testing.assert_array_equal(
        masks.logits, np.take_along_axis(logits, selected[:, :, None, None, None], 2)[:, :, 0]
    )


def test_stability_of_an_empty_mask_is_one():
    logits = jnp.array([[[-1.0, -2.0]], [[0.04, -1.0]], [[0.05, -0.05]], [[0.06, -0.04]]])
    np.testing.assert_array_equal(stability_score(logits, 0.05), [1.0, 0.0, 0.0, 0.5])


def test_bfloat16_stays_near_float32(images):
    full = random_model(BASE)
    half = random_model(BASE, dtype=jnp.bfloat16)
    sparse = jax.random.normal(jax.random.key(0), (B, G, 1, BASE.d_model))
    a, b = (segment(m, images, sparse) for m in (full, half))
    assert nnx.eval_shape(lambda m, x: m.encode(x), half, images).image_embed.dtype == jnp.bfloat16
    assert b.logits.dtype == jnp.float32
    assert np.corrcoef(np.ravel(a.logits), np.ravel(b.logits))[0, 1] > 0.99


@pytest.mark.parametrize("size_in, size_out", [(7, 32), (5, 40), (14, 14), (9, 4)])
def test_bicubic(size_in, size_out):
    x = torch.randn(1, 1, size_in, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(x, size=(size_out, 3), mode="bicubic")
    close(bicubic_matrix(size_in, size_out) @ x[0, 0].numpy(), expected[0, 0], 1e-6)


def abstract(config: Sam2Config) -> dict:
    model = shapes_of(lambda rngs: Sam2(config, rngs=rngs))
    return flatten_dict(nnx.to_pure_dict(nnx.state(model)))


# Millions of parameters that Meta publishes, and those of the parts an image model leaves out.
@pytest.mark.compiled
@pytest.mark.parametrize(
    "name, published", [("tiny", 38.9), ("small", 46.0), ("base_plus", 80.8), ("large", 224.4)]
)
def test_published_sizes(name, published):
    parameters = abstract(PRESETS[name])
    count = sum(int(np.prod(x.shape)) for x in parameters.values()) / 1e6
    assert count == pytest.approx(published - 7.47, abs=0.06)
    shapes = {
        entry.source: entry.transform.source_shape(
            parameters[
                tuple(int(p) if p.isdecimal() else p for p in entry.target.split("/")[1:])
            ].shape
        )
        for entry in table(PRESETS[name]).entries
    }
    assert len(shapes) == len(parameters)
    assert recognise(shapes) == PRESETS[name]


def test_config_round_trip_and_errors():
    assert read_sam2(write_sam2(PADDED)) == PADDED
    with pytest.raises(ValueError, match="pred_obj_scores"):
        read_sam2(write_sam2(BASE) | {"pred_obj_scores": False})
    with pytest.raises(ValueError, match=r"image_size 120"):
        dataclasses.replace(BASE, image_size=120)
    with pytest.raises(WeightsError, match=r"sam2_config\.json"):
        shapes = {"image_encoder.trunk.patch_embed.proj.weight": (8, 3, 7, 7)}
        recognise(shapes)
