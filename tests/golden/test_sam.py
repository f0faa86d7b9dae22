"""SAM 2 on the golden numbers: features, and masks with and without the stability rule."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens_jax.convert_weights.sam2 import table
from lens_jax.convert_weights.table import params_from
from lens_jax.model_configs.sam import read_sam2
from lens_jax.models.layers import shapes_of
from lens_jax.models.sam.segmenter import Sam2

FEATURES, MASKS = 2e-4, 8e-4  # absolute tolerances


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "query_forward.npz")


@pytest.fixture(scope="module")
def model(golden_dir, golden_weights):
    config = read_sam2(json.loads((golden_dir / "lens_tiny" / "sam2_config.json").read_text()))
    model = shapes_of(lambda rngs: Sam2(config, rngs=rngs))
    nnx.update(model, params_from(table(config), golden_weights, prefix="sam."))
    return model


@pytest.fixture(scope="module")
def features(model, golden):
    return nnx.jit(lambda m, x: m.encode(m.normalize(x)))(model, golden["sam_images_u8"])


def channels_first(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def check_sampled(golden, name, x, tolerance):
    """A channels-first array against the positions that golden keeps of it."""
    assert x.shape == tuple(golden[f"{name}_shape"])
    np.testing.assert_allclose(
        x.ravel()[golden[f"{name}_idx"]], golden[f"{name}_val"], rtol=0, atol=tolerance
    )


def test_trunk(model, golden):
    stages = nnx.jit(lambda m, x: m.image_encoder.trunk(m.normalize(x)))(
        model, golden["sam_images_u8"]
    )
    assert len(stages) == len(model.config.stages)
    for i, stage in enumerate(stages):
        check_sampled(golden, f"sam_trunk_stage_{i}", channels_first(stage), FEATURES)


def test_features(model, features, golden):
    image_embed = channels_first(features.image_embed)
    check_sampled(golden, "image_embed", image_embed, FEATURES)
    plain = features.image_embed - model.no_mem_embed[...]
    check_sampled(golden, "image_embed_no_nomem", channels_first(plain), FEATURES)
    for i, x in enumerate(features.high_res):
        check_sampled(golden, f"high_res_feat_{i}", channels_first(x), FEATURES)


def test_dense_position_encoding(model, golden):
    dense_pe = channels_first(model.sam_prompt_encoder.dense_pe())
    check_sampled(golden, "dense_pe", dense_pe[None], FEATURES)


def prefixes(golden):
    return sorted(name.removesuffix("sam_embedding") for name in golden if "sam_embedding" in name)


def decode(model, features, sparse, stability):
    run = nnx.jit(lambda m, f, s: m.decode(f, s, stability=stability))
    return jax.tree.map(np.asarray, run(model, features, jnp.asarray(sparse)))


def test_masks(model, features, golden):
    assert prefixes(golden)
    for prefix in prefixes(golden):
        sparse = golden[f"{prefix}sam_embedding"][:, None]  # [B, 1 prompt, 1 token, C]
        for mode, stability in (("eval", True), ("train", False)):
            masks = decode(model, features, sparse, stability)
            np.testing.assert_allclose(
                masks.logits, golden[f"{prefix}{mode}_low_res_masks"], rtol=0, atol=MASKS
            )
            expected = golden[f"{prefix}{mode}_selected_token"]
            np.testing.assert_array_equal(masks.selected_token[:, 0], expected)
        batch, _, tokens, height, width = masks.all_logits.shape
        all_logits = masks.all_logits.reshape(batch, tokens, height, width)
        check_sampled(golden, f"{prefix}all_mask_logits_4tokens", all_logits, MASKS)
        for name, x in (
            ("iou_pred_4tokens", masks.iou[:, 0]),
            ("object_score_logits", masks.object_score),
        ):
            np.testing.assert_allclose(x, golden[prefix + name], rtol=0, atol=FEATURES)
        # One pixel may change sides of a threshold.
        pixel = 1.5 / (masks.all_logits[:, :, 0] > 0).sum((2, 3)).min()
        np.testing.assert_allclose(
            masks.stability, golden[f"{prefix}stability_scores"], rtol=0, atol=pixel
        )


def test_sweep_is_one_group(model, features, golden):
    """Many prompts of one picture in one call, the picture's features not repeated."""
    first = jax.tree.map(lambda x: x[:1], features)
    sparse = golden["sweep_text_embeds"][None]
    stable = decode(model, first, sparse, True)
    plain = decode(model, first, sparse, False)
    step = stable.logits.shape[-1] // golden["sweep_low_eval"].shape[-1]
    for masks, name in ((stable, "sweep_low_eval"), (plain, "sweep_low_train")):
        np.testing.assert_allclose(
            masks.logits[0, :, ::step, ::step], golden[name], rtol=0, atol=MASKS
        )
    np.testing.assert_array_equal(stable.selected_token[0], golden["sweep_selected"])
    np.testing.assert_allclose(stable.iou[0], golden["sweep_iou"], rtol=0, atol=FEATURES)
    pixel = 1.5 / (stable.all_logits[0, :, 0] > 0).sum((1, 2)).min()
    np.testing.assert_allclose(stable.stability[0], golden["sweep_stability"], rtol=0, atol=pixel)
