"""Format rewards, boxes and their IoU: the official functions on golden's completions."""

import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from lens_jax.rewards import text_rewards
from lens_jax.rewards.box import box_iou

FORMATS = {
    "think_format": "think_format_reward",
    "grounding_format": "pr1_grounding_format_reward",
    "grounding_format_reasoning": "pr1_grounding_format_reward_reason",
}


@pytest.fixture(scope="module")
def rows(golden_dir):
    lines = (golden_dir / "rewards.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rewards(golden_dir, rows):
    tokenizer = AutoTokenizer.from_pretrained(golden_dir / "lens_tiny")
    ids = [tokenizer.encode(row["completion"], add_special_tokens=False) for row in rows]
    lengths = np.array([*map(len, ids)], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, i in zip(tokens, ids, strict=True):
        row[: len(i)] = i
    return jax.device_get(jax.jit(text_rewards(tokenizer))(tokens, lengths))


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, rows, rewards):
    official = [row[FORMATS[name]] == 1 for row in rows]
    np.testing.assert_array_equal(rewards[name], official)
    assert any(official) and not all(official)


def test_boxes(rows, rewards):
    boxes = np.array([row["parsed_box"] for row in rows])
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(rewards["box"], boxes.astype(np.float32), rtol=1e-6)
    # The official code has zeros for no box; so may a box that is written.
    assert rewards["box_found"][boxes.any(1)].all()
    assert not rewards["box"][~rewards["box_found"]].any()
    assert 0 < rewards["box_found"].mean() < 1


def test_box_rewards(rows, rewards):
    """Where the official code divides by zero the reward is 0."""
    truth = np.array([json.loads(row["solution"]) for row in rows], np.float32)
    ours = np.asarray(box_iou(rewards["box"], truth))
    for name, values in (("iou", ours), ("pr1_grounding_reward", ours**2)):
        official = [0 if isinstance(row[name], dict) else row[name] for row in rows]
        np.testing.assert_allclose(values, official, rtol=1e-5, atol=1e-6)
