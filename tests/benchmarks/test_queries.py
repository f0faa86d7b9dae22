"""The benchmark of the queries that go on from the rollout's caches."""

import json

import numpy as np
import pytest

from benchmarks import queries


def test_both_sides_read_the_same(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert queries.main(["--size", "tiny", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 4 and all(row["ours"] > 0 and row["theirs"] > 0 for row in rows.values())
    assert capsys.readouterr().out.count("largest difference") == 2


def test_sides_that_differ_are_not_timed():
    with pytest.raises(SystemExit, match="different things"):
        queries.agree(np.ones(3), np.array([1, 1, 1.1]), exact=True)
