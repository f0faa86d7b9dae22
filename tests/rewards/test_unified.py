"""Channels, weights, samples without target, and that no gradient passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.config import RewardsConfig
from lens_jax.models.inputs import Targets
from lens_jax.models.resample import valid_pixels
from lens_jax.rewards.segment import boundary_iou, mask_iou
from lens_jax.rewards.unified import UnifiedReward

CANVAS = (48, 48)
LENGTH = 80  # of the completions
COMPLETIONS = [
    ["[10,10,40,40]", "<think>a</think><answer>(10,10),(40,30)</answer>", "nothing"],
    ["[0,0,0,0]", "<think>no box</think> <answer></answer>", "[1,1,5,5]"],
]


def unified(score, custom=(), **settings):
    return UnifiedReward(score, RewardsConfig(**settings), custom)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    """Two prompts, the second without target, and three completions each."""
    rows = [[tokenizer.encode(text) for text in group] for group in COMPLETIONS]
    tokens = np.array([[row + [0] * (LENGTH - len(row)) for row in group] for group in rows])
    lengths = np.array([[len(row) for row in group] for group in rows])
    size = jnp.array([(40, 48), (48, 44)])
    valid = valid_pixels(size, CANVAS)
    mask = np.zeros((2, *CANVAS), bool)
    mask[0, 10:40, 10:40] = True
    mask[1, :, 46:] = True  # beyond the picture
    logits = np.full((2, 3, *CANVAS), -3.0, np.float32)
    logits[0, 0, 10:40, 10:40] = 3
    logits[0, 1, 10:40, 10:30] = 3
    logits[1, 1, 0, 0] = 3
    logits[1, :, :, 45:] = 3  # beyond the picture
    targets = Targets(
        box=jnp.array([[10, 10, 40, 40], [0, 0, 0, 0]], jnp.float32),
        mask=jnp.asarray(mask),
        mask_size=size,
        answer=jnp.zeros((2, 1), jnp.int32),
        answer_length=jnp.zeros(2, jnp.int32),
    )
    return jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(logits), targets, valid


def test_default_is_the_refcoco_recipe(score, inputs):
    """Box IoU squared and mask IoU squared; the format is reported and not rewarded."""
    rewards = jax.jit(unified(score, pattern="think_format"))(*inputs)
    assert rewards.names == ("format", "box", "segment")
    third = 20 / 30
    box = [[1, third**2, 0], [0, 1, 0]]
    segment = [[1, third**2, 0], [1, 0, 1]]
    np.testing.assert_allclose(rewards.channels["box"], box, rtol=1e-6)
    np.testing.assert_allclose(rewards.channels["segment"], segment, rtol=1e-6)
    np.testing.assert_array_equal(rewards.channels["format"], [[0, 1, 0], [0, 1, 0]])
    np.testing.assert_allclose(rewards.total, np.add(box, segment), rtol=1e-6)
    np.testing.assert_allclose(rewards.box_iou, np.sqrt(box), rtol=1e-6)
    np.testing.assert_allclose(rewards.mask_iou, np.sqrt(segment), rtol=1e-6)
    assert rewards.values.shape == (2, 3, 3)
    assert rewards.values.dtype == rewards.total.dtype == jnp.float32


def test_weights_squares_and_scale(score, inputs):
    _, _, logits, targets, valid = inputs
    reward = unified(
        score,
        format=0.5,
        pattern="think_format",
        box=2.0,
        segment=3.0,
        boundary=4.0,
        squared=("segment",),
        scale=0.1,
    )
    rewards = jax.jit(reward)(*inputs)
    values = rewards.channels
    assert rewards.names == ("format", "box", "segment", "boundary")
    iou = mask_iou(logits, targets.mask, valid)
    np.testing.assert_array_equal(values["segment"][0], iou[0] ** 2)
    np.testing.assert_array_equal(
        values["boundary"][0], boundary_iou(logits, targets.mask, valid)[0]
    )
    np.testing.assert_array_equal(values["boundary"][1], [1, 0, 1])
    np.testing.assert_allclose(values["box"][0], [1, 2 / 3, 0], rtol=1e-6)
    total = 0.5 * values["format"] + 2 * values["box"] + 3 * values["segment"]
    np.testing.assert_allclose(rewards.total, 0.1 * (total + 4 * values["boundary"]), rtol=1e-6)


def test_each_format_can_be_asked_for(score, inputs, tokenizer):
    text = "<think>a</think>\n<|object_ref_start|>cup<|object_ref_end|>"
    row = tokenizer.encode(text + "<|box_start|>b<|box_end|><|im_end|>")
    tokens = jnp.zeros((2, 3, LENGTH), jnp.int32).at[:, :, : len(row)].set(jnp.array(row))
    given = (tokens, jnp.full((2, 3), len(row)), *inputs[2:])
    for pattern, earned in (("grounding_format_reasoning", 1), ("grounding_format", 0)):
        rewards = jax.jit(unified(score, pattern=pattern))(*given)
        assert (rewards.channels["format"] == earned).all()


def test_a_box_without_a_mask_is_a_target(score, inputs):
    """A mask may shrink to nothing on the canvas; its box is still asked for."""
    tokens, lengths, logits, targets, valid = inputs
    targets = targets.replace(mask=jnp.zeros_like(targets.mask))
    rewards = jax.jit(unified(score))(tokens, lengths, logits, targets, valid)
    np.testing.assert_allclose(rewards.channels["box"][0], [1, 4 / 9, 0], rtol=1e-6)
    np.testing.assert_array_equal(rewards.channels["segment"][0], [0, 0, 0])


def test_an_empty_mask_earns_nothing_where_the_truth_fills_the_picture(score, inputs):
    """Neither has a boundary, which is no reason to call them alike."""
    tokens, lengths, logits, targets, valid = inputs
    targets = targets.replace(mask=jnp.ones_like(targets.mask))
    logits = jnp.full_like(logits, -3).at[:, 1].set(3).at[1, 2, :24].set(3)
    rewards = jax.jit(unified(score, boundary=1.0))(tokens, lengths, logits, targets, valid)
    for channel in ("segment", "boundary"):
        np.testing.assert_allclose(rewards.channels[channel][:, :2], [[0, 1], [0, 1]], rtol=1e-6)


def test_no_gradient_passes(score, inputs):
    tokens, lengths, logits, targets, valid = inputs

    def total(logits, box):
        rewards = unified(score, boundary=1.0)(
            tokens, lengths, logits, targets.replace(box=box), valid
        )
        return rewards.total.sum() + rewards.mask_iou.sum()

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(logits, targets.box):
        assert not gradient.any()


def brief(answers):
    """1 for a completion of at most 20 tokens."""
    return answers.lengths <= 20


def test_a_channel_of_ones_own(score, inputs):
    reward = unified(score, box=0, segment=0, custom=(brief,), custom_weights=(0.5,))
    rewards = jax.jit(reward)(*inputs)
    assert rewards.names[-1] == "brief"
    expected = np.asarray(inputs[1]) <= 20
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(rewards.channels["brief"], expected)
    np.testing.assert_allclose(rewards.total, 0.5 * expected)
    wrong = unified(score, custom=(lambda answers: jnp.ones(3),), custom_weights=(1,))
    with pytest.raises(ValueError, match="returns shape"):
        jax.eval_shape(wrong, *inputs)
