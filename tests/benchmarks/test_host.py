"""The benchmarks that have the host on one side: text rewards and data."""

import json

import jax
import numpy as np
import pytest

from benchmarks import data, rewards


def rows_of(benchmark, tmp_path) -> dict:
    file = tmp_path / "rows.json"
    assert benchmark.main(["--size", "tiny", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    for row in rows.values():
        assert set(row) == {"ours", "theirs", "ratio", "unit"}
        assert row["ours"] > 0 and row["theirs"] > 0
    return rows


def test_rewards(tmp_path, capsys):
    """It ends with an error if one completion is read otherwise by `re`."""
    assert len(rows_of(rewards, tmp_path)) == 3
    found = capsys.readouterr().out
    assert "12 grounding_format_reasoning" in found  # of 16, one in four without a box


def test_rewards_that_differ_are_not_timed():
    ours = {"think_format": np.array([True, False])}
    with pytest.raises(SystemExit, match="think_format differs"):
        rewards.agree(ours, jax.device_put({"think_format": np.array([True, True])}))


def test_data(tmp_path):
    """It ends with an error if a sample is not what the official preprocessing gives."""
    assert rows_of(data, tmp_path).keys() == {"pipeline"}
