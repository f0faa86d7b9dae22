"""Stage 2 on golden: rewards, advantages, losses and gradients of a GRPO update."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

from lens_jax.models.inputs import Batch, Targets
from lens_jax.models.lens import split_policy
from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards import text_rewards
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import grpo
from lens_jax.training.advantages import group_normalized
from lens_jax.training.state import in_grpo, split
from tests.golden import support, weights

LOGPS, LOSS, GRADIENT, MASKS, KL, REWARD = 4e-4, 1e-4, 1e-3, 8e-4, 1e-3, 2e-3
# Tag -> position scheme, pattern of the format reward, and where per-token arrays are stored.
TAGS = {
    "main": ("text", "think_format"),
    "refcoco_cfg": ("text", None),
    "mrope": ("mrope", "think_format"),
}
BETA = 0.04


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "stage2_loss.npz")


@pytest.fixture(scope="module")
def score(golden_dir):
    return text_rewards(AutoTokenizer.from_pretrained(golden_dir / "lens_tiny"))


def inputs(config, golden, golden_dir):
    group = int(golden["num_generations"])
    first = slice(None, None, group)
    prompts = support.prompts(
        config,
        golden["prompt_input_ids"][first],
        golden["prompt_attention_mask"][first],
        golden["pixel_values_unique"],
        golden["image_grid_thw_unique"],
        golden["sam_images_u8"][: len(golden["image_grid_thw_unique"])],
    )
    count = len(prompts.length)
    masks, sizes = support.canvas([golden[f"gt_mask_{i}"] for i in range(count)])
    solutions = support.read_json(golden_dir / "stage2_loss_texts.json")["solutions"][first]
    targets = Targets(
        box=np.array([json.loads(box) for box in solutions], np.float32),
        mask=masks,
        mask_size=sizes,
        answer=np.zeros((count, 1), np.int32),
        answer_length=np.ones(count, np.int32),
    )
    grouped = lambda x: x.reshape(count, group, *x.shape[1:])  # noqa: E731
    rollout = Rollout(
        tokens=grouped(golden["completion_ids"]),
        # The official mask counts padding where the end token is missing; so do these lengths.
        lengths=grouped(golden["completion_mask"].sum(1)),
        log_probs=np.zeros(grouped(golden["completion_ids"]).shape, np.float32),
        ended=np.ones((count, group), bool),
    )
    return Batch(prompts, targets, np.arange(count, dtype=np.int32)), rollout


@pytest.mark.parametrize("tag", TAGS)
def test_stage2(golden_dir, golden_weights, golden, score, tag):
    scheme, pattern = TAGS[tag]
    model = support.lens_model(golden_dir, golden_weights, scheme)
    past = support.lens_model(golden_dir, weights.reference(golden_dir), scheme)
    batch, rollout = inputs(model.config, golden, golden_dir)
    reward = UnifiedReward(
        score, format=float(pattern is not None), pattern=pattern or "think_format"
    )
    definition, trained, frozen = split(model, in_grpo)
    _, reference, rest = split_policy(past)

    @jax.jit
    def run(trained, frozen, reference, rest, batch, rollout):
        past = nnx.merge(definition, reference, rest)

        def loss(params):
            model = nnx.merge(definition, params, frozen)
            return grpo.sums(model, past, batch, rollout, reward, grpo.Objective(beta=BETA))

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        model = nnx.merge(definition, trained, frozen)
        prompts, targets = batch.prompts, batch.targets
        text = prompts, model.embed(prompts), rollout.tokens, rollout.lengths
        ours = model.score(*text, with_queries=True)
        text = prompts, past.embed(prompts), rollout.tokens, rollout.lengths
        theirs = past.score(*text, with_queries=False, positions="mrope")
        masks = model.masks(model.sam_features(prompts), ours.hidden, stability=False)
        canvas = targets.mask.shape[1:]
        logits = upsample_logits(masks.logits, targets.mask_size, canvas)
        valid = valid_pixels(targets.mask_size, canvas)
        rewards = reward(rollout.tokens, rollout.lengths, logits, targets, valid)
        return metrics, gradient, ours, theirs, masks, rewards

    metrics, gradient, ours, theirs, masks, rewards = run(
        trained, frozen, reference, rest, batch, rollout
    )
    flat = lambda x: np.asarray(x).reshape(-1, *np.shape(x)[2:])  # noqa: E731
    counted = golden["completion_mask"] == 1

    def close(x, y, **tolerance):
        np.testing.assert_allclose(x, y, **{"rtol": 0, **tolerance})

    close(flat(ours.log_probs)[counted], golden[f"{tag}_per_token_logps"][counted], atol=LOGPS)
    close(
        flat(theirs.log_probs)[counted], golden[f"{tag}_ref_per_token_logps"][counted], atol=LOGPS
    )
    prefix = "mrope_" if scheme == "mrope" else ""
    close(flat(ours.entropy)[counted], golden[f"{prefix}per_token_entropy"][counted], atol=LOGPS)
    close(flat(masks.logits)[:, None], golden[f"{prefix}low_res_masks"], atol=MASKS)
    close(flat(rewards.mask_iou), golden[f"{prefix}mask_ious"], atol=1e-3)

    # Official order: box, [format], mask.
    channels = rewards.channels
    names = ["box", *(["format"] if pattern else []), "segment"]
    stored = golden[f"{tag}_rewards_per_func"]
    assert stored.shape[1] == len(names)
    close(np.stack([flat(channels[n]) for n in names], -1), stored, atol=REWARD)
    close(flat(rewards.total), golden[f"{tag}_rewards"], atol=REWARD)
    # Exact rewards: a pixel at the threshold moves an advantage by more than float32 does.
    group = int(golden["num_generations"])
    advantages = group_normalized(golden[f"{tag}_rewards"].reshape(-1, group))
    close(flat(advantages), golden[f"{tag}_advantages"], rtol=1e-3, atol=1e-4)

    count = rollout.lengths.size
    close(metrics["mask_bce"] / count, golden[f"{tag}_mask_bce"], rtol=LOSS)
    close(metrics["mask_dice"] / count, golden[f"{tag}_mask_dice"], rtol=LOSS)
    close(metrics["kl"] / count, golden_kl(golden, tag, counted), rtol=KL)
    close(metrics["loss_policy"] / count, golden[f"{tag}_loss_rec"], rtol=2e-3)
    close(metrics["loss"] / count, golden[f"{tag}_loss_total"], rtol=LOSS)

    gradient = jax.tree.map(lambda x: x / count, gradient)
    norms = support.read_json(golden_dir / "stage2_grad_norms.json")[tag]
    support.check_gradient_norms(support.gradient_norms(model.config, gradient), norms)
    total = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    close(total, golden[f"{tag}_grad_norm"], rtol=GRADIENT)
    check_gradients(model.config, golden, tag, nnx.to_pure_dict(gradient))


def golden_kl(golden, tag, counted):
    """Mean over completions of the mean k3 over tokens, from golden's log-probs."""
    d = golden[f"{tag}_ref_per_token_logps"] - golden[f"{tag}_per_token_logps"]
    k3 = np.where(counted, np.exp(d) - d - 1, 0)
    return np.mean(k3.sum(1) / counted.sum(1))


def check_gradients(config, golden, tag, gradient):
    """Some gradients in full, 1e-3 of their largest entry."""
    if tag not in ("main", "mrope"):
        return
    prefix = "mrope_grad_" if tag == "mrope" else "grad_"
    language, visual = gradient["language"], gradient["visual"]
    ours = {
        "learnable_query": gradient["context"]["queries"][None],
        "visual_block0_qkv_bias": visual["blocks"]["qkv"]["bias"][0],
        "norm_weight": language["norm"]["scale"],
        "layer0_qproj": language["layers"]["q_proj"]["kernel"][0].T,
    }
    for name, value in ours.items():
        stored = golden[prefix + name]
        np.testing.assert_allclose(
            value, stored, rtol=0, atol=GRADIENT * np.abs(stored).max(), err_msg=name
        )
