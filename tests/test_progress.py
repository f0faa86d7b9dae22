"""What commands show while they work."""

import errno
import io
import logging
import os
import subprocess
import sys

import pytest

from lens_jax import files, progress
from lens_jax.commands import cli


def test_a_bar_says_compiling_and_counts_the_rest_without_it():
    clock = [0.0]
    shown = io.StringIO()
    bar = progress.Bar(total=10, initial=2, desc="grpo", unit="step", file=shown, mininterval=0)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    assert str(bar) == "grpo: compiling, 2/10 step"
    clock[0] = 100.0
    bar.update(1)
    assert "3/10" in str(bar) and "<?" in str(bar) and "compiling" not in str(bar)
    clock[0] = 102.0
    bar.update(2)
    assert "5/10 [01:42<00:05,  1.00step/s]" in str(bar)
    for _ in progress.Bar(range(3), file=shown):
        pass
    plain = progress.Bar(total=3, desc="again", compiles=False, file=shown)
    assert str(plain).startswith("again:   0%") and "compiling" not in str(plain)
    plain.close()
    hidden = progress.Bar(total=1, disable=True)
    hidden.update(1)
    hidden.close()


def test_warnings_are_lines_of_their_own(capfd):
    handler = progress.Warnings()
    bar = progress.Bar(total=3, desc="checking")
    handler.handle(logging.makeLogRecord({"msg": "a\n b", "levelname": "WARNING"}))
    bar.close()
    assert "warning: a b" in capfd.readouterr().err.replace("\r", "\n").split("\n")


def test_counts():
    words = [progress.counted(n, "row") for n in (0, 1, 2, 1024)]
    assert words == ["0 rows", "1 row", "2 rows", "1,024 rows"]


def test_hidden_directories_of_killed_processes_are_removed(tmp_path):
    target = tmp_path / "start"
    code = "import sys, os; from lens_jax import files; from pathlib import Path; "
    code += "files.hidden_directory(Path(sys.argv[1])); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    mine, other = files.hidden_directory(target), files.hidden_directory(target)
    assert not left.exists() and mine.exists() and other.exists()
    mine.rename(target)
    files.discard(mine)
    files.discard_all()
    assert list(tmp_path.iterdir()) == [target]


def test_errors_of_the_system_name_the_file_and_what_to_do(tmp_path, capfd):
    file = tmp_path / "scores.json"
    file.write_text("old")
    with pytest.raises(OSError) as error, files.whole(file) as unfinished:
        unfinished.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    assert cli.complain(error.value) == 2
    said = "error: {}: the disk is full: make room, then give the same command again\n"
    assert capfd.readouterr().err == said.format(file)
    assert files.explain(OSError("in words")) == "in words"
    for wrong in (tmp_path / "none", file / "below", tmp_path):
        with pytest.raises(OSError) as error:
            wrong.read_text()
        text = files.explain(error.value)
        assert text.startswith(f"{wrong}: ") and "rrno" not in text and text.count(": ") >= 2


def test_addresses_keep_both_slashes():
    typed = "https://a.org/b.png, gs://bucket/x and /tmp/a:/b"
    assert files.as_typed(typed.replace("://", ":/")) == typed
