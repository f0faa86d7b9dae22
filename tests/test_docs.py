"""The commands that README and docs print: all parse, and those for own data run in order."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lens_jax import config
from lens_jax.commands import cli
from lens_jax.convert_weights import from_torch
from lens_jax.flags import UsageError
from lens_jax.preparation import shapes_refcoco
from tests import xla

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:\.venv/bin/)?python (?:-m )?(launch|tools|benchmarks)[/.](\w+)(?:\.py)?( .+)?$"
)


def fences(page: Path, language: str = r"\w*") -> list[str]:
    """The code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command of this repository that a page prints, in a block or,
    with its flags, in a sentence."""
    lines = "\n".join(fences(page)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python [^`]+ --[^`]+)`", page.read_text(encoding="utf-8"))
    found = filter(None, map(COMMAND.search, lines))
    return [(module(m[1], m[2]), shlex.split(m[3] or "", comments=True)) for m in found]


def module(folder: str, name: str) -> str:
    """The module whose `main` a command calls."""
    if name == "convert_weights":
        return "lens_jax.convert_weights.__main__"
    return f"lens_jax.commands.{name}" if folder == "launch" else f"{folder}.{name}"


@pytest.fixture
def parse(monkeypatch):
    """Parses a command's arguments; returns its exit code."""
    # The reader's own rewards are not there.
    monkeypatch.setattr(config.checks, "import_function", lambda path: None)

    def parse_only(command, parser, argv) -> int:
        try:
            options = parser.parse_args(argv)
        except UsageError as error:
            return cli.complain(error)
        if "overrides" in options:
            file = ["--config", str(options.config)] if options.config else []
            config.load([*file, *options.overrides])
        return 0

    monkeypatch.setattr(cli, "call", parse_only)

    def call(name: str, argv: list[str]) -> int:
        if name == "lens_jax.commands.train":
            # A run's own config.yaml is not there before the run.
            config.load([arg.replace("runs/tiny/config", "configs/tiny") for arg in argv])
            return 0
        return importlib.import_module(name).main(argv)

    return call


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "tests/README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_printed_commands_parse(page, parse, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    for name, argv in commands(page):
        try:
            code = parse(name, argv)
        except SystemExit as stop:  # --help
            code = stop.code
        assert code == 0, (name, argv, capfd.readouterr().err)


def test_commands_are_found():
    """The two tests here would pass on pages that they cannot read."""
    found = [command for page in [*PAGES, ROOT / "tests/README.md"] for command in commands(page)]
    names = {name for name, _ in found}
    assert len(found) > 30
    launched = {module("launch", file.stem) for file in (ROOT / "launch").glob("*.py")}
    tools = ("convert_weights", "export_checkpoint", "kill_test", "measure_conversion")
    others = {module("tools", name) for name in tools} | {"benchmarks.update"}
    assert launched | others <= names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:lens_jax|launch|tools|tests|benchmarks|configs)/[\w./]+)`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        other = page.parent / target if target else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            missing.append(f"{target}#{anchor}")
    assert not missing


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_module_has_its_line():
    """docs/architecture.md names each module of the package, or its folder."""
    named = set(re.findall(r"`(lens_jax/[\w./]+)`", (ROOT / "docs/architecture.md").read_text()))
    for module in (ROOT / "lens_jax").rglob("*.py"):
        path = module.relative_to(ROOT)
        folders = {f"{folder.as_posix()}/" for folder in path.parents}
        assert path.name == "__init__.py" or path.as_posix() in named or folders & named, path


# What docs/own_data.md prints -> what is enough to see that it works.
SHORTER = {
    "--alignment.steps 20": "--alignment.steps 2",
    "--alignment.warmup_steps 2": "--alignment.warmup_steps 1",
    "--grpo.steps 10": "--grpo.steps 2",
    "--limit 200": "--limit 4",
}


@pytest.mark.nightly
def test_own_data_and_quickstart_as_printed(tmp_path):
    """Draw, check, fine-tune, evaluate, predict; the tiny model has seen no stage yet."""
    for name in ("checkpoints", "configs", "launch", "lens_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    run, tiny = tmp_path / "runs" / "tiny", ROOT / "checkpoints" / "tiny"
    from_torch(output=run / "final", mllm=tiny / "qwen2_5_vl", sam=tiny / "sam2", num_queries=8)
    shapes_refcoco.write_refcoco(run / "data", {"train": 1, "val": 4}, seed=5)
    own, quick = (ROOT / "docs" / name for name in ("own_data.md", "quickstart.md"))
    blocks = [*fences(own, "bash"), *(b for b in fences(quick) if "launch/predict.py" in b)]
    script = "\n".join(blocks).partition("pip install")[0]
    for printed, shorter in SHORTER.items():
        assert printed in script
        script = script.replace(printed, shorter)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.flags(optimization=0),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    subprocess.run(["bash", "-eux", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "my_data" / "check.html").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert json.loads((tmp_path / "scores.json").read_text())["samples"] == 12
    assert len(list((tmp_path / "predictions").iterdir())) == 3 * (30 + 1)
    assert len(list((tmp_path / "masks").iterdir())) == 3 * 2
    assert (tmp_path / "scores.html").is_file()


def test_what_documented_commands_write_is_ignored_by_git():
    """A clone stays clean after the README has been tried."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    flags = r"--(?:output|page|rows|run_dir|local-dir)[ =]([\w.-][\w./-]*)"
    named = {name.rstrip(".") for name in re.findall(flags, text) if name.islower()}
    named |= {"predictions/a.json", "runs/.scenes/0", ".scenes/0", "LENS-3B/a"}
    assert {"scores.html", "my_data", "lens"} <= named
    shown = [name if "." in name else f"{name}/a" for name in sorted(named)]
    command = ["git", "check-ignore", "--no-index", "--verbose", "--non-matching", *shown]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode > 1:
        pytest.skip("not in a git repository")
    missed = [line for line in said.stdout.splitlines() if line.startswith("::")]
    assert not missed
