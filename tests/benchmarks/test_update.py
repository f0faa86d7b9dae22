"""The update's benchmark: what it counts, and that it runs."""

import json

import pytest

from benchmarks import update
from benchmarks.common import SIZES

SMALL, LARGE = (34, 46), (52, 92)  # 391 and 1,196 image tokens


@pytest.mark.parametrize(
    ("prompt", "completion", "grid", "least"),
    [
        (430, 40, SMALL, 4.4),
        pytest.param(430, 256, SMALL, 2.5, marks=pytest.mark.nightly),
        pytest.param(1300, 40, LARGE, 6.2, marks=pytest.mark.nightly),
        pytest.param(1300, 256, LARGE, 4.3, marks=pytest.mark.nightly),
    ],
)
def test_arithmetic_at_full_size(prompt, completion, grid, least):
    """Qwen2.5-VL-3B and SAM 2 large, vision tower, encoder and reference included."""
    ours, official = update.operations(SIZES["3b"], prompt, completion, grid)
    assert official >= least * ours
    # All that the group does not share, and nothing less, keeps the ratio below G.
    assert official < SIZES["3b"].group * ours


def test_all_sides_agree_and_are_reported(tmp_path, capsys):
    """It ends with an error if PyTorch's loss or gradient norm is not ours."""
    pytest.importorskip("torch")
    file = tmp_path / "update.json"
    assert update.main(["--size", "tiny", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {name.partition(",")[0] for name in rows} == {"time", "FLOPs a group", "peak memory"}
    for row in rows.values():
        assert set(row) == {"ours", "theirs", "ratio", "unit"}
        assert row["ours"] > 0 and row["theirs"] > 0
    table = capsys.readouterr().out
    assert all(name in table for name in rows)


def test_sides_that_differ_are_not_timed():
    sides = {"ours": (1.0, 2.0), "theirs": (1.0, 2.1)}
    update.agree(sides, 0.1)
    with pytest.raises(SystemExit, match="theirs computes something else"):
        update.agree(sides, 0.01)
