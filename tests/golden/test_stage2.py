"""Stage 2 on golden: rewards, advantages, losses and gradients of a GRPO update, by option.

One tag goes through the whole update. For the others the model runs once a position scheme: a
stand-in gives the objective what the model computed, and what the objective wants changed there is
pulled back through the model.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from transformers import AutoTokenizer

from lens_jax.config import GRPOConfig, RewardsConfig
from lens_jax.models.inputs import Batch, Targets
from lens_jax.models.lens import Score, split_policy
from lens_jax.models.parameters import select
from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards import text_rewards
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import grpo
from lens_jax.training.advantages import RULES
from lens_jax.training.losses import KL_ESTIMATES, token_mean
from lens_jax.training.state import create
from tests.golden import support, weights

LOGPS, LOSS, GRADIENT, MASKS, KL, REWARD = 4e-4, 1e-4, 1e-3, 8e-4, 1e-3, 2e-3
BETA = 0.04
TRAINED = select(GRPOConfig().trained)


@dataclasses.dataclass(frozen=True)
class Tag:
    """A golden run, by the options that differ from the official recipe with think format."""

    scheme: str = "text"
    same_reference: bool = False
    objective: dict = dataclasses.field(default_factory=dict)
    rewards: dict = dataclasses.field(default_factory=dict)


TAGS = {
    "main": Tag(),
    "refcoco_cfg": Tag(rewards=dict(format=0.0)),
    "res_only": Tag(objective=dict(policy_weight=0.0)),
    "rec_only": Tag(objective=dict(segmentation_weight=0.0)),
    "boundary": Tag(rewards=dict(boundary=1.0)),
    "nosq": Tag(rewards=dict(squared=("box", "boundary"))),
    "k1": Tag(objective=dict(kl="k1")),
    "kimikl": Tag(objective=dict(kl="kimi")),
    "fullkimi": Tag(objective=dict(kl="kimi", advantages="centered", surrogate="probability")),
    "nomean": Tag(objective=dict(advantages="no_mean_for_same_reward")),
    "nokl": Tag(objective=dict(beta=0.0)),
    "entropy": Tag(objective=dict(entropy_weight=0.01)),
    "detach": Tag(objective=dict(detach_segmentation=True)),
    "scale2": Tag(rewards=dict(scale=2.0)),
    "sameweights_ref": Tag(same_reference=True),
    "mrope": Tag(scheme="mrope"),
    "mrope_sameweights_ref": Tag(scheme="mrope", same_reference=True),
}
# Optimised programs run faster, but take twice as long to compile.
QUICK = {"xla_backend_optimization_level": 0}
# Its state are the last gradients.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, _, params: (gradients, gradients),
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "stage2_loss.npz")


@pytest.fixture(scope="module")
def score(golden_dir):
    return text_rewards(AutoTokenizer.from_pretrained(golden_dir / "lens_tiny"))


@pytest.fixture(scope="module")
def norms(golden_dir):
    return support.read_json(golden_dir / "stage2_grad_norms.json")


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


@dataclasses.dataclass
class Case:
    """Golden's model in one position scheme, and its one batch."""

    model: nnx.Module
    batch: Batch
    rollout: Rollout
    score: Score
    logits: jax.Array
    pull_back: callable
    """Cotangents of log-probs, entropy and mask logits -> gradient; a last argument of 0 cuts
    the way from the masks to the queries' hidden states."""


@pytest.fixture(scope="module")
def case(golden_dir, golden_weights, golden):
    """Position scheme -> Case."""
    cases = {}

    def get(scheme):
        if scheme not in cases:
            cases[scheme] = make(scheme)
        return cases[scheme]

    def make(scheme):
        model = support.lens_model(golden_dir, golden_weights, scheme)
        batch, rollout = inputs(model.config, golden, golden_dir)
        definition, trained, frozen = nnx.split(model, TRAINED, ...)

        def run(trained, frozen, batch, rollout, cotangents, through):
            def forward(params):
                model = nnx.merge(definition, params, frozen)
                prompts = batch.prompts
                score = model.score(
                    prompts,
                    model.embed(prompts),
                    rollout.tokens,
                    rollout.lengths,
                    with_queries=True,
                )
                hidden = score.hidden
                hidden = through * hidden + (1 - through) * jax.lax.stop_gradient(hidden)
                masks = model.decode_masks(model.sam_features(prompts), hidden, stability=False)
                return score.log_probs, score.entropy, masks.logits

            out, pull_back = jax.vjp(forward, trained)
            return out, pull_back(cotangents)[0]

        shape = rollout.tokens.shape
        side = golden["low_res_masks"].shape[-2:]
        start = tuple(np.zeros(s, np.float32) for s in (shape, shape, (*shape[:2], *side)))
        arguments = trained, frozen, batch, rollout
        program = jax.jit(run).lower(*arguments, start, np.float32(1)).compile(QUICK)
        (log_probs, entropy, logits), _ = program(*arguments, start, np.float32(1))
        return Case(
            model,
            batch,
            rollout,
            Score(log_probs, entropy),
            logits,
            lambda cotangents, through: program(*arguments, cotangents, np.float32(through))[1],
        )

    return get


@pytest.fixture(scope="module")
def references(golden_dir, case):
    """Log-probs of the reference of most tags, and of one with the policy's weights (True)."""
    one = case("text")
    prompts, rollout = one.batch.prompts, one.rollout
    definition, same, rest = split_policy(one.model)
    moved = support.lens_model(golden_dir, weights.reference(golden_dir), "text")
    _, moved, _ = split_policy(moved)

    @jax.jit
    def run(policy):
        model = nnx.merge(definition, policy, rest)
        return model.score(
            prompts,
            model.embed(prompts),
            rollout.tokens,
            rollout.lengths,
            with_queries=False,
            positions="mrope",
        ).log_probs

    program = run.lower(same).compile(QUICK)
    return {False: program(moved), True: program(same)}


class StandIn:
    """Says what a model has computed. `hidden` is 1: what reaches it shows by its gradient."""

    embed = sam_features = lambda self, prompts: None

    def __init__(self, log_probs, entropy=None, logits=None, hidden=None):
        self.log_probs, self.entropy, self.hidden = log_probs, entropy, hidden
        self.logits = logits

    def score(self, *_, with_queries, positions=None):
        policy = self.logits is not None
        assert (with_queries, positions) == ((True, None) if policy else (False, "mrope"))
        return Score(self.log_probs, self.entropy, self.hidden)

    def decode_masks(self, _, hidden, *, stability):
        assert not stability
        return SimpleNamespace(logits=self.logits * hidden)


def reward_of(tag, score):
    options = dict(format=1.0, pattern="think_format") | tag.rewards
    return UnifiedReward(score, RewardsConfig(**options))


@pytest.mark.parametrize("tag", TAGS)
def test_stage2(golden, norms, score, case, references, tag):
    options = TAGS[tag]
    case, past = case(options.scheme), references[options.same_reference]
    batch, rollout, targets = case.batch, case.rollout, case.batch.targets
    reward = reward_of(options, score)
    objective = GRPOConfig(**dict(beta=BETA) | options.objective)
    reference = StandIn(past) if objective.beta else None

    @jax.jit
    def run(computed, batch, rollout):
        def loss(computed):
            return grpo.sums(StandIn(*computed), reference, batch, rollout, reward, objective)

        (_, metrics), cotangents = jax.value_and_grad(loss, has_aux=True)(computed)
        canvas = targets.mask.shape[1:]
        logits = upsample_logits(computed[2], targets.mask_size, canvas)
        valid = valid_pixels(targets.mask_size, canvas)
        rewards = reward(rollout.tokens, rollout.lengths, logits, targets, valid)
        return metrics, cotangents, rewards

    computed = case.score.log_probs, case.score.entropy, case.logits, np.float32(1)
    program = run.lower(computed, batch, rollout).compile(QUICK)
    metrics, cotangents, rewards = program(computed, batch, rollout)
    check_scores(golden, tag, options, case, past)
    check_rewards(golden, tag, objective, rewards)

    count = rollout.lengths.size
    check_losses(golden, tag, objective, {k: v / count for k, v in metrics.items()})
    *cotangents, on_hidden = cotangents
    assert (on_hidden == 0) == (objective.detach_segmentation or not objective.segmentation_weight)
    gradient = case.pull_back(tuple(cotangents), float(on_hidden != 0))
    gradient = jax.tree.map(lambda x: x / count, gradient)
    check_gradient(case.model.config, golden, norms, tag, gradient)


def test_whole_update(golden_dir, golden, norms, score, case):
    """The program that training runs, on the tag of the official reasoning recipe."""
    tag, case = "main", case("text")
    past = support.lens_model(golden_dir, weights.reference(golden_dir), "text")
    definition, trained, frozen = nnx.split(case.model, TRAINED, ...)
    _, reference, rest = split_policy(past)
    objective = GRPOConfig(beta=BETA)
    update = grpo.make_update(
        definition, rest, KEEP_GRADIENTS, reward_of(TAGS[tag], score), objective
    )
    arguments = create(trained, KEEP_GRADIENTS), frozen, reference, case.batch, case.rollout
    state, metrics = jax.jit(update).lower(*arguments).compile(QUICK)(*arguments)
    check_losses(golden, tag, objective, metrics)
    close(metrics["grad_norm"], golden[f"{tag}_grad_norm"], rtol=GRADIENT)
    check_gradient(case.model.config, golden, norms, tag, state.moments)


def flat(x):
    return np.asarray(x).reshape(-1, *np.shape(x)[2:])


def close(x, y, **tolerance):
    np.testing.assert_allclose(x, y, **{"rtol": 0, **tolerance})


def check_scores(golden, tag, options, case, past):
    """Log-probs, entropy, masks, and each estimate of the KL, whichever the tag trains with."""
    counted = golden[f"{tag}_completion_mask"] == 1
    ours = flat(case.score.log_probs)
    close(ours[counted], golden[f"{tag}_per_token_logps"][counted], atol=LOGPS)
    close(flat(past)[counted], golden[f"{tag}_ref_per_token_logps"][counted], atol=LOGPS)
    prefix = "mrope_" if options.scheme == "mrope" else ""
    entropy = flat(case.score.entropy)
    close(entropy[counted], golden[f"{prefix}per_token_entropy"][counted], atol=LOGPS)
    close(flat(case.logits)[:, None], golden[f"{prefix}low_res_masks"], atol=MASKS)
    for name, estimate in KL_ESTIMATES.items():
        kl = token_mean(estimate(case.score.log_probs, past), counted.reshape(past.shape)).mean()
        # k1 is a sum of differences that cancel: as exact as log-probs are.
        close(kl, golden[f"{tag}_mean_{name}"], rtol=KL, atol=LOGPS if name == "k1" else 1e-6)
        if options.scheme == "mrope" and options.same_reference:
            assert abs(kl) < 1e-6


def check_rewards(golden, tag, objective, rewards):
    """In the official order of the channels: box, [format], mask, [boundary]."""
    names = ["box", "format", "segment", "boundary"]
    stored = golden[f"{tag}_rewards_per_func"]
    prefix = "mrope_" if tag.startswith("mrope") else ""
    close(flat(rewards.mask_iou), golden[f"{prefix}mask_ious"], atol=1e-3)
    weights = TAGS[tag].rewards
    if not weights.get("format", 1.0):
        names.remove("format")
    if not weights.get("boundary"):
        names.remove("boundary")
    assert stored.shape[1] == len(names)
    channels = rewards.channels
    close(np.stack([flat(channels[n]) for n in names], -1), stored, atol=REWARD)
    total = flat(rewards.total)
    tolerance = REWARD * weights.get("scale", 1.0)
    close(total, golden[f"{tag}_rewards"], atol=tolerance)

    group = int(golden["num_generations"])
    total = total.reshape(-1, group)
    for ours, name in ((total.mean(1), "mean"), (total.std(1, ddof=1), "std")):
        close(np.repeat(ours, group), golden[f"{tag}_{name}_grouped"], atol=tolerance)
    # Exact rewards: a pixel at the threshold moves an advantage by more than float32 does.
    advantages = RULES[objective.advantages](golden[f"{tag}_rewards"].reshape(-1, group))
    close(flat(advantages), golden[f"{tag}_advantages"], rtol=1e-3, atol=1e-4)


def check_losses(golden, tag, objective, metrics):
    """Means over completions."""
    close(metrics["mask_bce"], golden[f"{tag}_mask_bce"], rtol=LOSS)
    close(metrics["mask_dice"], golden[f"{tag}_mask_dice"], rtol=LOSS)
    segmentation = metrics["mask_bce"] + metrics["mask_dice"]
    close(segmentation, golden[f"{tag}_loss_res"], rtol=LOSS)
    kl = golden[f"{tag}_mean_{objective.kl}"] if objective.beta else 0.0
    k1 = objective.kl == "k1"
    close(metrics["kl"], kl, rtol=KL, atol=LOGPS if k1 else 1e-6)
    atol = BETA * LOGPS if k1 else 1e-6
    close(metrics["loss_policy"], golden[f"{tag}_loss_rec"], rtol=KL, atol=atol)
    close(metrics["loss"], golden[f"{tag}_loss_total"], rtol=LOSS, atol=atol)


def check_gradient(config, golden, norms, tag, gradient):
    """Every parameter's norm where golden has them, the global norm, some gradients in full."""
    if tag in norms:
        support.check_gradient_norms(support.gradient_norms(config, gradient), norms[tag])
    total = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    close(total, golden[f"{tag}_grad_norm"], rtol=GRADIENT)
    prefix = {"main": "grad_"}.get(tag, f"{tag}_grad_")
    gradient = nnx.to_pure_dict(gradient)
    language, visual = gradient["language"], gradient["visual"]
    ours = {
        "learnable_query": gradient["context"]["queries"][None],
        "visual_block0_qkv_bias": visual["blocks"]["qkv"]["bias"][0],
        "norm_weight": language["norm"]["scale"],
        "layer0_qproj": language["layers"]["q_proj"]["kernel"][0].T,
    }
    for name, value in ours.items():
        if prefix + name in golden:
            stored = golden[prefix + name]
            close(value, stored, atol=GRADIENT * np.abs(stored).max(), err_msg=name)
