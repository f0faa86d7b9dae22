"""The comparison of compiled attention programs."""

import json

import jax
import pytest

from benchmarks import attention


def test_programs_are_compiled_and_reported(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu, which holds the compiler, is not installed")
    file = tmp_path / "attention.json"
    with jax.default_matmul_precision("default"):
        assert attention.main(["--size", "tiny", "--rows", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * 4
    for name, row in rows.items():
        assert row.keys() == {"ours", "theirs", "ratio", "unit"}
        assert row["theirs"] > 0 or "temporaries" in name
