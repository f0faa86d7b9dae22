"""Plain Qwen2.5-VL on golden prompts: features, hidden states, logits, greedy text."""

import jax
import numpy as np
import pytest
from flax import nnx

from lens_jax.models.qwen_vl.head import logits
from lens_jax.rollout.sampler import rollout
from lens_jax.rollout.sampling import GREEDY, Sampling
from tests.golden import support

VISION, HIDDEN = 1e-4, 4e-4


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "mllm_forward.npz")


@pytest.fixture(scope="module")
def model(golden_dir, golden_weights):
    return support.lens_model(golden_dir, golden_weights, "mrope")


def prompts_of(model, golden, pixels):
    side = model.config.sam.image_size
    blank = np.zeros((len(golden["input_ids"]), side, side, 3), np.uint8)
    return support.prompts(
        model.config,
        golden["input_ids"],
        golden["attention_mask"],
        pixels["pixel_values"],
        golden["image_grid_thw"],
        blank,
    )


@pytest.fixture(scope="module")
def prompts(model, golden):
    return prompts_of(model, golden, golden)


def left_padded(x, length):
    """Rows of right-padded prompts as golden stores them."""
    return np.stack([np.roll(row, len(row) - n, axis=0) for row, n in zip(x, length, strict=True)])


def test_vision_features(model, golden, prompts):
    merged = np.asarray(
        nnx.jit(lambda m, p: m.visual(p.patches, p.patch_positions, p.patch_mask))(model, prompts)
    )
    rows = [merged[i, index[index >= 0]] for i, index in enumerate(np.asarray(prompts.image_index))]
    np.testing.assert_allclose(np.concatenate(rows), golden["vision_features"], rtol=0, atol=VISION)


def test_positions(golden, prompts):
    for i, n in enumerate(prompts.length):
        ours, theirs = prompts.positions[i, :, :n], golden["position_ids"][:, i, -n:]
        np.testing.assert_array_equal(ours, theirs)


def test_hidden_states_and_logits(model, golden, prompts):
    @nnx.jit
    def forward(model, prompts):
        embedded = model.embed(prompts)
        mask = np.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
        hidden, _ = model.language.prefill(embedded, prompts.positions, mask)
        return embedded, hidden, logits(hidden, model.language.head)

    embedded, hidden, z = (
        left_padded(np.asarray(x), prompts.length) for x in forward(model, prompts)
    )
    attended = golden["attention_mask"][..., None] == 1
    support.check_sampled(golden, "embeddings_in", embedded, HIDDEN, attended)
    for ours, name in ((hidden, "last_hidden"), (z, "logits")):
        np.testing.assert_allclose(ours * attended, golden[name], rtol=0, atol=HIDDEN)


def test_hidden_state_of_a_layer(model, golden, prompts):
    """After the first layer: the stack run without the layers behind it."""
    depth = 1
    state = nnx.state(model.language.layers)
    shorter = nnx.merge(
        nnx.graphdef(model.language.layers), jax.tree.map(lambda x: x[:depth], state)
    )
    whole, norm = model.language.layers, model.language.norm
    try:
        model.language.layers, model.language.norm = shorter, lambda x: x
        mask = np.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
        hidden, _ = model.language.prefill(model.embed(prompts), prompts.positions, mask)
    finally:
        model.language.layers, model.language.norm = whole, norm
    attended = golden["attention_mask"][..., None] == 1
    hidden = left_padded(np.asarray(hidden), prompts.length)
    support.check_sampled(golden, "hidden_layer1", hidden, HIDDEN, attended)


def decode(model, prompts, steps, ends, sampling):
    run = nnx.jit(
        lambda model, prompts: rollout(
            model,
            prompts,
            model.embed(prompts),
            np.arange(len(prompts.length)),
            jax.random.key(0),
            num_completions=2,
            max_new_tokens=steps,
            end_tokens=ends,
            sampling=sampling,
        )
    )
    return run(model, prompts)


@pytest.mark.parametrize("file", ["greedy_generation", "greedy_generation_reppen1.05"])
def test_greedy_text(model, golden, golden_dir, file):
    """Both completions of a group are the one golden completion, up to its end."""
    greedy = np.load(golden_dir / "greedy_generation.npz")
    stored = np.load(golden_dir / f"{file}.npz")
    penalty = float(stored["repetition_penalty"]) if "repetition_penalty" in stored else 1.0
    sampling = Sampling(top_k=1, repetition_penalty=penalty)
    ends = support.read_json(golden_dir / "lens_tiny" / "generation_config.json")["eos_token_id"]
    completions = stored["completions"]
    prompts = prompts_of(model, greedy, golden)
    out = decode(model, prompts, completions.shape[1], tuple(ends), sampling)
    for row, expected in enumerate(completions):
        stop = np.flatnonzero(np.isin(expected, ends))
        length = stop[0] + 1 if stop.size else len(expected)
        for g in range(2):
            assert out.lengths[row, g] == length
            assert bool(out.ended[row, g]) == bool(stop.size)
            np.testing.assert_array_equal(out.tokens[row, g, :length], expected[:length])


def test_greedy_text_with_other_end_tokens(model, golden, golden_dir):
    greedy = np.load(golden_dir / "greedy_generation.npz")
    ends = tuple(int(i) for i in greedy["custom_eos_ids"])
    completions = greedy["custom_eos_completions"]
    prompts = prompts_of(model, greedy, golden)
    out = decode(model, prompts, completions.shape[1], ends, GREEDY)
    for row, expected in enumerate(completions):
        length = int(out.lengths[row, 0])
        np.testing.assert_array_equal(out.tokens[row, 0, :length], expected[:length])
        assert out.ended[row, 0] == (expected[length - 1] in ends)
