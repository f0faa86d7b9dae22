"""What commands say before they do anything: their help, and mistakes in flags, in one line."""

import contextlib
import errno
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lens_jax import config as configs
from lens_jax.commands import cli
from lens_jax.flags import UsageError

ROOT = Path(__file__).parents[1]
SUBCOMMANDS = {
    "lens_jax.commands.data": ("check", "convert"),
    "lens_jax.convert_weights.__main__": ("from_torch", "to_torch", "verify"),
}
# Prints every page with its parser's flags, and which slow packages were imported for them.
SCRIPT = """
import argparse, contextlib, importlib, io, json, sys

pages, parsers = {}, []
shown = argparse.ArgumentParser.format_help

def format_help(parser):
    parsers.append(parser)
    return shown(parser)

argparse.ArgumentParser.format_help = format_help
for name, commands in json.loads(sys.argv[1]).items():
    main = importlib.import_module(name).main
    for command in [None, *commands]:
        parsers.clear()
        with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
            main([*([command] if command else []), "--help"])
        flags = [
            (action.option_strings, action.help, action.required)
            for parser in parsers
            for action in parser._actions
            if action.help != argparse.SUPPRESS
        ]
        groups = [(g.title, g.description) for p in parsers for g in p._action_groups]
        pages[f"{name} {command}" if command else name] = page.getvalue(), flags, groups
slow = [name for name in ("torch", "transformers", "tensorboardX") if name in sys.modules]
print(json.dumps([pages, slow]))
"""


def commands() -> dict[str, tuple[str, ...]]:
    """Modules with a command line -> their sub-commands."""
    parts = ("lens_jax/commands", "lens_jax/convert_weights", "tools", "benchmarks")
    files = [file for part in parts for file in (ROOT / part).glob("*.py")]
    names = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted(files)
        if re.search("^def main", file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    return {name: SUBCOMMANDS.get(name, ()) for name in names}


@functools.cache
def collected() -> tuple[dict, list[str]]:
    """The pages, and the slow packages, of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands())],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages, slow = json.loads(done.stdout)
    return pages, slow


PAGES = [
    " ".join(filter(None, (name, command)))
    for name, parts in commands().items()
    for command in (None, *parts)
]


def test_help_waits_for_nothing_slow():
    pages, slow = collected()
    assert sorted(pages) == sorted(PAGES) and len(pages) > 20
    assert slow == []


@pytest.mark.parametrize("name", PAGES)
def test_help(name):
    page, flags, groups = collected()[0][name]
    usage, _, rest = page.partition("\n\n")
    strange = (
        r"<class|Optional\[|Literal\[|Union\[|typing|\bCONFIG\b|NoneType|[a-z]Int\b|[a-z]Float\b"
    )
    assert not re.search(strange, page)
    assert usage.startswith("usage: ")
    program = re.match(r"usage: ((?:python -m )?\S+)", usage)[1].removeprefix("python ")
    assert f"python {program}" in rest.rpartition("\nexample:\n")[2]
    assert not re.search(r":\n*(\n\n|$)", rest), "a sentence goes on where nothing follows"
    for title, description in groups:
        assert ". " not in title, "a title is cut from a longer text"
        assert description is None or description.endswith("."), description
    for names, text, required in flags:
        assert text and len(text) > 6, names
        assert not (required and names and f"[{names[-1]}" in usage), names
    if not flags:  # a list of commands
        assert all(f"\n  {command} " in page for command in SUBCOMMANDS[name])


def test_help_shows_the_defaults_that_hold(tmp_path, capsys, monkeypatch):
    def shown(*argv) -> str:
        with pytest.raises(SystemExit) as stop:
            configs.load([*argv, "--help"])
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    steps = configs.load([]).grpo.steps
    default = (
        "--grpo.steps N Number of updates. 0 skips the stage. (whole number of at least 0; "
        f"default: {steps}"
    )
    assert f"{default}, from configs/tiny.yaml)" in shown()
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("rollout: {top_k: 7}\n")
    page = shown("--config", "own.yaml")
    top_k = "--rollout.top_k N Draw from this many of the likeliest tokens. 0: from all."
    assert f"{top_k} (whole number of at least 0; default: 7, from own.yaml)" in page
    assert (
        "--grpo.steps N Number of updates. 0 skips the stage. (whole number of at least 0; " in page
    )
    assert "; default: 0) --grpo.trained" in page
    assert "--model.checkpoint PATH" in page and "(path; default: null)" in page


def test_what_null_means_is_said():
    from tools.write_config_docs import page

    rows = [line.split(" | ") for line in page().splitlines() if "or null |" in line]
    assert len(rows) > 9 and [row[0] for row in rows if "null" not in row[3]] == []


def test_usage_lines_are_alike():
    """Every command has --help, and none says so in its usage."""
    usages = [page.partition("\n\n")[0] for page, *_ in collected()[0].values()]
    assert [usage for usage in usages if "[-h]" in usage] == []


def test_a_config_is_checked_before_it_is_printed(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("data: 5\n")
    for flag in ("--print_config", "--help"):
        with pytest.raises(SystemExit) as stop:
            configs.load(["--config", str(file), flag])
        assert stop.value.code == 2
        out, error = capsys.readouterr()
        assert (
            out == "" and error == "error: data: expected a section with keys of its own, got 5\n"
        )


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("lens_jax.commands.predict --reasoning", "--reasoning needs a value: true or false"),
        ("lens_jax.commands.predict --checkpoint", "--checkpoint needs a value: a path"),
        (
            "lens_jax.commands.predict --reasoning maybe",
            "--reasoning: expected true or false, got maybe",
        ),
        (
            "lens_jax.commands.evaluate --limit -3",
            "--limit: expected a whole number of at least 1, got -3",
        ),
        (
            "lens_jax.commands.evaluate --limit=",
            "--limit: expected a whole number of at least 1, got nothing",
        ),
        ("lens_jax.commands.evaluate --batch_size 2.5", "whole number of at least 1, got 2.5"),
        (
            "lens_jax.commands.evaluate --dataset coco",
            "--dataset: expected one of refcoco, refcoco+",
        ),
        (
            "lens_jax.commands.compile --slices -3",
            "--slices: expected a whole number of at least 1, got -3",
        ),
        ("lens_jax.commands.compile --topology", "--topology needs a value: text"),
        (
            "lens_jax.commands.compile --stage 3",
            "--stage: expected one of alignment, grpo, evaluation, got 3",
        ),
        ("lens_jax.commands.compare --output x", "give RUN"),
        ("lens_jax.commands.compare runs/x", "give --output"),
        ("lens_jax.commands.compare --output", "--output needs a value: a path"),
        (
            "lens_jax.commands.train --grpo.steps -3",
            "grpo.steps: expected a whole number of at least 0, got -3",
        ),
        (
            "lens_jax.commands.train --grpo.steps",
            "grpo.steps needs a value: a whole number of at least 0",
        ),
        (
            "lens_jax.commands.train --mesh.data=-3",
            "mesh.data: expected a whole number of at least 1, got -3",
        ),
        (
            "lens_jax.commands.train --grpo.entropy_weight x",
            "grpo.entropy_weight: expected a number, got x",
        ),
        (
            "lens_jax.commands.train --data.windows [0]",
            "each item a whole number of at least 1, got 0",
        ),
        (
            "lens_jax.commands.train --grpo.trained language",
            "grpo.trained: expected a list in brackets, each",
        ),
        ("lens_jax.commands.train --run_dir", "run_dir needs a value: a path"),
        ("lens_jax.commands.train --config", "config needs a value: a YAML file"),
        ("lens_jax.commands.train --config no.yaml", "--config: no.yaml: there is no such file"),
        ("lens_jax.commands.train --config=docs", "--config: docs: a folder, not a file"),
        ("lens_jax.commands.train --help --config no.yaml", "--config: no.yaml: there is no"),
        ("lens_jax.commands.train --data 5", "data is a section: give its keys, --data.KEY VALUE"),
        (
            "lens_jax.commands.train configs/tiny.yaml",
            "unknown: configs/tiny.yaml; a key is given as",
        ),
        ("lens_jax.convert_weights.__main__ from_torch --num_queries -3", "at least 1, got -3"),
        ("tools.export_checkpoint --step -3", "--step: expected a whole number of at least 0 or"),
        (
            "tools.make_tiny_sam --steps -3",
            "--steps: expected a whole number of at least 1, got -3",
        ),
        ("tools.make_tiny_vlm --output /nowhere", "/nowhere holds no tokenizer.json: first run"),
        (
            "benchmarks.update --repeats 0",
            "--repeats: expected a whole number of at least 1, got 0",
        ),
        ("benchmarks.update --json", "--json needs a value: a path"),
        ("benchmarks.data --json /dev/null/x", "/dev/null: a file of this name is there already"),
        ("benchmarks.attention --chip v9", "--chip: expected one of v4, v5e, v5p, v6e, got v9"),
    ],
)
def test_a_mistake_is_one_line(command, says, capsys):
    name, *argv = command.split()
    module = __import__(name, fromlist=["main"])
    with contextlib.suppress(SystemExit):
        assert module.main(argv) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1, error
    assert says in error


def system(number: int, *name: str | bytes) -> OSError:
    """As a system call raises it."""
    return OSError(number, os.strerror(number), *name)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (system(errno.ENOENT, "a.json"), "a.json: there is no such file or folder"),
        (system(errno.EACCES, b"a"), "a: permission denied: give another path"),
        (system(errno.EISDIR, "a"), "a: a folder, not a file"),
        (system(errno.ENOSPC), "the disk is full: make room"),
        (system(errno.ENOSPC, "a"), "a: the disk is full: make room"),
        (system(errno.EIO, "a"), "a: Input/output error"),
        (OSError(errno.EINVAL, "3 is no port", "a"), "a: 3 is no port"),
        (OSError("a.npz is damaged"), "a.npz is damaged"),
        (UsageError("give --x"), "give --x"),
    ],
)
def test_errors_of_the_system_are_told(error, says, capsys):
    assert cli.complain(error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {says}") and "Errno" not in printed


def test_what_can_be_written_is_known_before(tmp_path):
    cli.check_writable(tmp_path / "new" / "scores.json")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(IsADirectoryError):
        cli.check_writable(tmp_path)
    (tmp_path / "old").write_text("kept")
    cli.check_writable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
    with pytest.raises(OSError, match="old"):
        cli.check_writable(tmp_path / "old" / "scores.json")


def test_a_command_says_where_it_computes():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        cli.announce("runs/x", "float32")
        cli.announce("runs/x", devices=jax.devices()[:1])
    both, one = said.getvalue().splitlines()
    assert re.fullmatch(r"lens-jax: (\d+ x )?cpu \(\d+ cores\) · runs/x · float32", both)
    assert re.fullmatch(r"lens-jax: cpu \(\d+ cores\) · runs/x", one)


@pytest.mark.parametrize(
    "command",
    [
        *sorted((ROOT / "launch").glob("*.py")),
        ROOT / "benchmarks/data.py",
        "-mtools.convert_weights",
    ],
    ids=str,
)
def test_a_python_without_the_packages_is_told(command):
    """-S leaves site-packages out."""
    done = subprocess.run(
        [sys.executable, "-S", command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: \S+ has no jax and \d+ more packages: run .+\n", done.stderr)
