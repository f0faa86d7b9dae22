"""The pass with queries: SAM's prompt token and masks, in both position schemes."""

import numpy as np
import pytest
from flax import nnx

from lens_jax.models.qwen_vl.head import logits
from tests.golden import support

HIDDEN, EMBEDDING, MASKS = 4e-4, 2e-4, 8e-4
SCHEMES = {"text": "", "mrope": "_mrope"}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "query_forward.npz")


@pytest.fixture(scope="module")
def pixels(golden_dir):
    return np.load(golden_dir / "mllm_forward.npz")["pixel_values"]


@nnx.jit
def run(model, prompts, completions, lengths):
    embedded = model.embed(prompts)
    prompt_hidden, hidden = model.hidden_states(
        prompts, embedded, completions, lengths, with_queries=True
    )
    queries = hidden[:, :, completions.shape[2] :]
    features = model.sam_features(prompts)
    masks = {
        mode: model.decode_masks(features, queries, stability=mode == "eval")
        for mode in ("train", "eval")
    }
    z = logits(prompt_hidden, model.language.head), logits(hidden, model.language.head)
    return queries, model.context(queries), masks, z


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("what", ["prompt", "completed"])
def test_query_pass(golden_dir, golden_weights, golden, pixels, scheme, what):
    model = support.lens_model(golden_dir, golden_weights, scheme)
    ids, mask = golden["prompt_input_ids"], golden["prompt_attention_mask"]
    prompts = support.prompts(
        model.config, ids, mask, pixels, golden["image_grid_thw"], golden["sam_images_u8"]
    )
    p = ids.shape[1]
    if what == "completed":
        completions = golden["completed_input_ids"][:, None, p:]
        lengths = golden["completed_attention_mask"][:, None, p:].sum(-1)
    else:
        completions, lengths = np.zeros((len(ids), 1, 1), np.int32), np.zeros((len(ids), 1), int)
    hidden, token, masks, (prompt_z, own_z) = run(model, prompts, completions, lengths)
    name = f"{what}{SCHEMES[scheme]}"

    close = lambda x, y, atol: np.testing.assert_allclose(x, y, rtol=0, atol=atol)  # noqa: E731
    close(hidden[:, 0], golden[f"{name}_last_hidden_queries"], HIDDEN)
    close(token, golden[f"{name}_sam_embedding"], EMBEDDING)
    for mode, out in masks.items():
        np.testing.assert_array_equal(
            out.selected_token[:, 0], golden[f"{name}_{mode}_selected_token"]
        )
        close(out.logits, golden[f"{name}_{mode}_low_res_masks"], MASKS)
    out = masks["eval"]
    support.check_sampled(golden, f"{name}_all_mask_logits_4tokens", out.all_logits, MASKS)
    close(out.iou[:, 0], golden[f"{name}_iou_pred_4tokens"], HIDDEN)
    close(out.object_score.reshape(-1, 1), golden[f"{name}_object_score_logits"], MASKS)

    # Golden's row: left padding, prompt, completion with its padding, queries.
    t = completions.shape[2] if what == "completed" else 0
    rows = []
    for i, n in enumerate(prompts.length):
        own = np.asarray(own_z[i, 0])
        own = own if t else own[completions.shape[2] :]
        rows.append(np.concatenate([np.roll(prompt_z[i], p - n, axis=0), own]))
    attended = np.concatenate(
        [golden[f"{what}_attention_mask"], np.ones_like(np.asarray(hidden[:, 0, :, 0]))], axis=1
    )
    support.check_sampled(
        golden, f"{name}_logits", np.stack(rows), HIDDEN, attended[..., None] == 1
    )
