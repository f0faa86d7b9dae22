"""launch/tpu: what the scripts would run; nothing here talks to a cloud."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "tpu"
SLICE = ["--name", "lens", "--zone", "us-west4-a", "--project", "p"]
GKE = ["--cluster", "lens", "--zone", "us-west4-a", "--project", "p"]


def shown(script: str, *argv: str) -> list[list[str]]:
    """The commands that --dry_run prints, each as its words."""
    command = [FOLDER / script, *argv[:1], "--dry_run", *argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [shlex.split(line.replace("$'", "'")) for line in done.stdout.splitlines()]


def refused(script: str, *argv: str) -> str:
    done = subprocess.run([FOLDER / script, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    return done.stderr


IMAGES = {
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v5p-64": "v2-alpha-tpuv5",
    "v6e-16": "v2-alpha-tpuv6e",
}


@pytest.mark.parametrize(("kind", "image"), IMAGES.items())
def test_create_asks_for_a_slice_with_its_image(kind, image):
    (words,) = shown("slice.sh", "create", *SLICE, "--type", kind, "--spot")
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "lens"]
    options = dict(zip(words[6::2], words[7::2], strict=False))
    assert options["--accelerator-type"] == kind and options["--runtime-version"] == image
    assert options["--zone"] == "us-west4-a" and options["--project"] == "p"
    assert words[-1] == "--spot"


def test_the_same_command_on_every_worker():
    command = ["python", "launch/train.py", "--run_dir", "a b"]
    (words,) = shown("slice.sh", "run", *SLICE, "--", *command)
    assert words[3:6] == ["tpu-vm", "ssh", "lens"]
    assert words[words.index("--worker") + 1] == "all"
    remote = words[words.index("--command") + 1]
    line = remote.split("nohup setsid ")[1].split(">run.log")[0]
    assert shlex.split(line) == command
    assert remote.startswith("cd lens-jax;") and remote.endswith(">run.pid")


def test_code_comes_by_copy_or_clone():
    archive, sent, installed = shown("slice.sh", "copy", *SLICE)
    assert archive[0] == "git" and sent[3:5] == ["tpu-vm", "scp"]
    assert sent[5] == archive[archive.index("--output") + 1]
    assert "--worker" in sent and 'editable ".[tpu]"' in installed[-1]
    (cloned,) = shown(
        "slice.sh", "clone", *SLICE, "--repository", "https://host/x", "--branch", "b"
    )
    assert "--branch b https://host/x lens-jax" in cloned[-1]


def test_the_rest_of_a_slice_s_life():
    for name, part in {
        "wait": "queued-resources describe lens",
        "log": "tail -n 100 -F lens-jax/run.log",
        "stop": "kill -TERM",
        "delete": "queued-resources delete lens",
    }.items():
        (words,) = shown("slice.sh", name, *SLICE)
        assert part in " ".join(words), name


def test_gke():
    job = ["--job", "one"]
    (words,) = shown("gke.sh", "create", *GKE, "--type", "v5litepod-16", "--slices", "2", "--spot")
    assert words[:3] == ["xpk", "cluster", "create"] and words[-1] == "--spot"
    assert words[words.index("--num-slices") + 1] == "2"
    (words,) = shown("gke.sh", "run", *GKE, *job, "--type", "v6e-16", "--", "python", "x y")
    assert words[:3] == ["xpk", "workload", "create"]
    assert shlex.split(words[-1].split("exec ")[1]) == ["python", "x y"]
    for name, start in {"log": "kubectl logs", "stop": "xpk workload delete"}.items():
        (words,) = shown("gke.sh", name, *GKE, *job)
        assert " ".join(words).startswith(start)
    (words,) = shown("gke.sh", "delete", *GKE)
    assert words[:3] == ["xpk", "cluster", "delete"]


def test_mistakes_are_one_line():
    assert "give --zone" in refused("slice.sh", "create", "--name", "x")
    assert "give --type" in refused("slice.sh", "create", *SLICE)
    assert "v5litepod-N" in refused("slice.sh", "create", *SLICE, "--type", "v4-8")
    assert "unknown option --nmae" in refused("slice.sh", "create", "--nmae", "x")
    assert "unknown command begin" in refused("slice.sh", "begin", *SLICE)
    assert "give the command after --" in refused("slice.sh", "run", *SLICE)
    assert "give --job" in refused("gke.sh", "log", *GKE)


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "-x", *FOLDER.glob("*.sh")], check=True, cwd=FOLDER.parents[1])
