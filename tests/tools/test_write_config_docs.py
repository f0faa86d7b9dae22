"""docs/config.md says what lens_jax/config says."""

import dataclasses

import pytest

from lens_jax import config
from tools import write_config_docs


def test_the_page_is_up_to_date():
    stored = write_config_docs.FILE.read_text(encoding="utf-8")
    assert stored == write_config_docs.page(), "run python -m tools.write_config_docs"


def test_every_key_is_explained():
    page = write_config_docs.page()
    rows = [line for line in page.splitlines() if line.startswith("| `")]

    def count(cls) -> int:
        return sum(
            count(f.type) if dataclasses.is_dataclass(f.type) else 1
            for f in dataclasses.fields(cls)
        )

    assert len(rows) == count(config.RunConfig)
    assert all(row.split(" | ")[-1].strip(" |") for row in rows)


def test_only_the_bare_command_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(write_config_docs, "FILE", tmp_path / "config.md")
    with pytest.raises(SystemExit):
        write_config_docs.main(["--help"])
    assert "Writes docs/config.md" in capsys.readouterr().out
    assert write_config_docs.main(["--output", "x"]) == 2
    assert not write_config_docs.FILE.exists()
    assert write_config_docs.main([]) == 0 and write_config_docs.FILE.exists()
