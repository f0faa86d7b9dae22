"""What an evaluation counts, with a model that answers what it is told to."""

from types import SimpleNamespace

import numpy as np
import pytest

from lens_jax import evaluation
from lens_jax.data.evaluation_batches import EvaluationRow
from lens_jax.data.sample import Sample

SIZE = (8, 8)
BOX = (2.0, 2.0, 6.0, 6.0)
SQUARE = np.zeros(SIZE, bool)
SQUARE[2:6, 2:6] = True
NOTHING = np.zeros(SIZE, bool)


def scores(*asked):
    """Of (true mask, true box, drawn mask, written box), a row each; and the rows."""
    rows, responses = [], []
    for number, (mask, box, _, _) in enumerate(asked):
        box = None if box is None else np.array(box)
        image = np.zeros((*SIZE, 3), np.uint8)
        sample = Sample(image, ("it",), mask, box, number, number, f"{number}.png")
        rows.append(EvaluationRow(number, "it", sample, SIZE))
    responses = SimpleNamespace(
        mask_logits=np.stack([np.where(drawn, 5.0, -5.0) for _, _, drawn, _ in asked]),
        box=np.array([box or (0, 0, 0, 0) for *_, box in asked], np.float32),
        box_found=np.array([box is not None for *_, box in asked]),
        formats={"grounding_format": np.ones(len(asked), bool)},
        ended=np.ones(len(asked), bool),
    )
    lens = SimpleNamespace(
        respond=lambda prompts, sample_id, limit: responses,
        completion_text=lambda responses, i: "text",
    )
    batch = SimpleNamespace(
        prompts=None,
        sample_id=None,
        targets=SimpleNamespace(box=np.array([box or (0, 0, 0, 0) for _, box, _, _ in asked])),
    )
    item = SimpleNamespace(batch=batch, valid=np.ones(len(asked), bool), rows=rows, limit=None)

    class Data(list):
        reasoning = False

    return evaluation.evaluate(lens, Data([item]), dataset="folder", split="val")


def test_samples_without_target_are_scored_as_they_are_rewarded():
    """No box and an empty mask are right, and all else is wrong: in every score."""
    result, rows = scores(
        (SQUARE, BOX, SQUARE, BOX),
        (NOTHING, None, NOTHING, None),
        (NOTHING, None, SQUARE, None),
        (NOTHING, None, NOTHING, BOX),
    )
    assert [row.box_iou for row in rows] == [1, 1, 1, 0]
    assert [row.iou for row in rows] == [pytest.approx(1, abs=1e-4), 1, 0, 1]
    assert [row.total_reward for row in rows] == [pytest.approx(2, abs=1e-4), 2, 1, 1]
    assert result["box_iou"] == result["precision_at_0.5"] == 0.75
    assert result["giou"] == pytest.approx(0.75, abs=1e-4)
    assert result["ciou"] == pytest.approx(16 / 32)


def test_a_data_set_without_boxes_has_no_box_iou():
    """Nothing was meant in one picture, which makes it no data set of boxes."""
    result, rows = scores((SQUARE, None, SQUARE, BOX), (NOTHING, None, NOTHING, None))
    assert result["box_iou"] is None and [row.box_iou for row in rows] == [None, None]
    assert result["giou"] == pytest.approx(1, abs=1e-4)
