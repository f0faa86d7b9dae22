"""Stage 1 on golden: the loss, the masks and the gradients, by option."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lens_jax.config import AlignmentConfig
from lens_jax.models.inputs import Batch, Targets
from lens_jax.models.parameters import select
from lens_jax.training import alignment
from tests.golden import support

LOSS, GRADIENT, MASKS, EMBEDDING = 1e-4, 1e-3, 8e-4, 2e-4
WITH_SAM = ("context", "sam_encoder", "sam_decoder")


@dataclasses.dataclass(frozen=True)
class Tag:
    """A golden run. Tags that share the first three fields share a program."""

    scheme: str = "text"
    trained: tuple[str, ...] = WITH_SAM  # with a frozen SAM, the others' gradients are the same
    stability: bool = True
    unstable: bool = False


TAGS = {
    "official": Tag(),
    "unstable": Tag(unstable=True),
    "samgrad_eval": Tag(),
    "samgrad_train": Tag(stability=False),
    "mrope": Tag(scheme="mrope", trained=AlignmentConfig().trained),
}
# Optimised programs run faster, but take twice as long to compile.
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "stage1_loss.npz")


def batch_of(config, golden, golden_dir):
    """Golden's sequences end with the answer; ours are cut there."""
    texts = support.read_json(golden_dir / "stage1_loss_texts.json")
    ids, mask = golden["input_ids"], golden["attention_mask"]
    start = "<|im_start|>assistant\n"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(golden_dir / "lens_tiny")
    answers = [
        tokenizer.encode(text.split(start)[1], add_special_tokens=False)
        for text in texts["prompts_text_after_expansion"]
    ]
    prompt_mask = mask.copy()
    for row, answer in enumerate(answers):
        np.testing.assert_array_equal(ids[row, -len(answer) :], answer)
        prompt_mask[row, -len(answer) :] = 0
    prompts = support.prompts(
        config, ids, prompt_mask, golden["pixel_values"], golden["image_grid_thw"],
        golden["sam_images_u8"],
    )  # fmt: skip
    longest = max(map(len, answers))
    masks, sizes = support.canvas([golden[f"mask_{i}"] for i in range(len(ids))])
    targets = Targets(
        box=np.zeros((len(ids), 4), np.float32),
        mask=masks,
        mask_size=sizes,
        answer=np.stack([np.pad(a, (0, longest - len(a))) for a in answers]).astype(np.int32),
        answer_length=np.array([len(a) for a in answers], np.int32),
    )
    return Batch(prompts, targets, np.arange(len(ids), dtype=np.int32))


@pytest.fixture(scope="module")
def programs():
    """(position scheme, trained parts, stability) -> compiled program."""
    return {}


def run(programs, tag, model, batch):
    definition, trained, frozen = nnx.split(model, select(tag.trained), ...)

    def program(trained, frozen, batch):
        def loss(params):
            model = nnx.merge(definition, params, frozen)
            return alignment.sums(model, batch, stability=tag.stability)

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        model = nnx.merge(definition, trained, frozen)
        answer, length = batch.targets.answer, batch.targets.answer_length
        hidden = model.encode_queries(
            batch.prompts, model.embed(batch.prompts), answer[:, None], length[:, None]
        )
        masks = model.decode_masks(
            model.sam_features(batch.prompts), hidden, stability=tag.stability
        )
        return metrics, gradient, model.context(hidden), masks

    key = tag.scheme, tag.trained, tag.stability
    if key not in programs:
        programs[key] = jax.jit(program).lower(trained, frozen, batch).compile(QUICK)
    return programs[key](trained, frozen, batch)


@pytest.mark.parametrize("name", TAGS)
def test_stage1(golden_dir, golden_weights, golden, programs, name):
    tag, tensors = TAGS[name], dict(golden_weights)
    if tag.unstable:
        key = "sam.sam_mask_decoder.output_hypernetworks_mlps.0.layers.{}.{}"
        last = max(int(k.split(".")[5]) for k in tensors if k.startswith(key[:-6]))
        for kind in ("weight", "bias"):
            tensors[key.format(last, kind)] = tensors[key.format(last, kind)] * np.float32(0.25)
    model = support.lens_model(golden_dir, tensors, tag.scheme)
    batch = batch_of(model.config, golden, golden_dir)
    metrics, gradient, token, masks = run(programs, tag, model, batch)
    count = len(batch.sample_id)
    for ours, theirs in {"loss": "loss", "mask_bce": "bce", "mask_dice": "dice"}.items():
        np.testing.assert_allclose(metrics[ours] / count, golden[f"{name}_{theirs}"], rtol=LOSS)
    np.testing.assert_array_equal(masks.selected_token[:, 0], golden[f"{name}_selected_token"])
    np.testing.assert_allclose(masks.logits, golden[f"{name}_low_res_masks"], rtol=0, atol=MASKS)
    # The mask decoder and how it is trained change nothing before it.
    prefix = "mrope_" if tag.scheme == "mrope" else ""
    np.testing.assert_allclose(token, golden[f"{prefix}sam_embedding"], rtol=0, atol=EMBEDDING)

    gradient = jax.tree.map(lambda x: x / count, gradient)
    norms = support.read_json(golden_dir / "stage1_grad_norms.json")[name]
    norms = {key.removeprefix("trainer_"): norm for key, norm in norms.items()}
    support.check_gradient_norms(support.gradient_norms(model.config, gradient), norms)
    gradient = nnx.to_pure_dict(gradient)
    totals = {"lens": gradient["context"]}
    if name.startswith("samgrad"):
        totals["all"] = gradient
    for which, part in totals.items():
        total = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(part)))
        np.testing.assert_allclose(total, golden[f"{name}_grad_norm_{which}"], rtol=GRADIENT)
    if f"{prefix}grad_learnable_query" in golden and name in ("official", "mrope"):
        ours, theirs = gradient["context"]["queries"], golden[f"{prefix}grad_learnable_query"][0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=GRADIENT * np.abs(theirs).max())
