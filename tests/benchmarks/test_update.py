"""The update's benchmark: what it counts, and that it runs."""

import pytest

from benchmarks import update
from benchmarks.common import SIZES

SMALL, LARGE = (34, 46), (52, 92)  # 391 and 1,196 image tokens


@pytest.mark.parametrize(
    ("prompt", "completion", "grid", "least"),
    [
        (430, 40, SMALL, 4.4),
        (430, 256, SMALL, 2.5),
        (1300, 40, LARGE, 6.2),
        (1300, 256, LARGE, 4.3),
    ],
)
def test_arithmetic_at_full_size(prompt, completion, grid, least):
    """Qwen2.5-VL-3B and SAM 2 large, vision tower, encoder and reference included."""
    ours, official = update.operations(SIZES["3b"], prompt, completion, grid)
    assert official >= least * ours
    # All that the group does not share, and nothing less, keeps the ratio below G.
    assert official < SIZES["3b"].group * ours
