"""launch/tpu: what the scripts would run, and what of it workers run; nothing talks to a cloud."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
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
    line = remote.split("nohup setsid ")[1].split(">>run.log")[0]
    assert shlex.split(line) == command
    assert remote.startswith("cd lens-jax") and remote.endswith(">run.pid")


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
        "mount": "mount -t nfs",
        "delete": "queued-resources delete lens",
    }.items():
        share = ["--share", "10.1.2.2:/lens"] if name == "mount" else []
        (words,) = shown("slice.sh", name, *SLICE, *share)
        assert part in " ".join(words), name


def test_gke():
    job = ["--job", "one"]
    (words,) = shown("gke.sh", "create", *GKE, "--type", "v5litepod-16", "--slices", "2", "--spot")
    assert words[:3] == ["xpk", "cluster", "create"] and words[-1] == "--spot"
    assert words[words.index("--num-slices") + 1] == "2"
    (words,) = shown("gke.sh", "run", *GKE, *job, "--type", "v6e-16", "--", "python", "x y")
    assert words[:3] == ["xpk", "workload", "create"]
    assert words[words.index("--termination-grace-period-seconds") + 1] == "3600"
    assert shlex.split(words[-1].split("exec ")[1]) == ["python", "x y"]
    for name, start in {"log": "kubectl logs", "stop": "xpk workload delete"}.items():
        (words,) = shown("gke.sh", name, *GKE, *job)
        assert " ".join(words).startswith(start)
    (words,) = shown("gke.sh", "log", *GKE, *job, "--worker", "2")
    assert words[-1].endswith("job-completion-index=2")
    (words,) = shown("gke.sh", "mount", *GKE, "--share", "files:/lens")
    assert words[:5] == ["xpk", "storage", "attach", "files", "--cluster"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--type"] == "gcpfilestore" and options["--vol"] == "lens"
    assert options["--mount-point"] == "/mnt/lens" and options["--auto-mount"] == "true"
    (words,) = shown("gke.sh", "delete", *GKE)
    assert words[:3] == ["xpk", "cluster", "delete"]


def test_mistakes_are_one_line():
    assert "give --zone" in refused("slice.sh", "create", "--name", "x")
    assert "give --type" in refused("slice.sh", "create", *SLICE)
    assert "v5litepod-N" in refused("slice.sh", "create", *SLICE, "--type", "v4-8")
    assert "unknown option --nmae" in refused("slice.sh", "create", "--nmae", "x")
    assert "unknown command begin" in refused("slice.sh", "begin", *SLICE)
    assert "give the command after --" in refused("slice.sh", "run", *SLICE)
    assert "give --share" in refused("slice.sh", "mount", *SLICE)
    assert "SERVER:/EXPORT" in refused("slice.sh", "mount", *SLICE, "--share", "gs://bucket")
    assert "begins with /" in refused("slice.sh", "mount", *SLICE, "--share", "h:/x", "--at", "x")
    assert "give --job" in refused("gke.sh", "log", *GKE)
    assert "INSTANCE:/EXPORT" in refused("gke.sh", "mount", *GKE, "--share", "lens")


# Commands that stand for those of a cloud and of a worker. gcloud runs what a worker would run in
# $HOME, and copies to it; the others say how they were called.
FAKES = {
    "gcloud": """
words=("$@")
while (($#)); do
  case $1 in
    describe) echo "gcloud: no such thing" >&2; exit 1 ;;
    scp) cp "$2" "$HOME/${3#*:}"; exit ;;
    --command) cd "$HOME" && exec bash -c "$2" ;;
  esac
  shift
done
echo "not expected: ${words[*]}" >&2; exit 3""",
    "hostname": "echo worker-0",
    "python3": """echo "python3 $*" >>"$HOME/calls"; [[ $* != *" venv "* ]] || mkdir -p .venv""",
    "sudo": """echo "sudo $*" >>"$HOME/calls"; [[ $1 != mkdir ]] || "$@" """,
    "findmnt": """cat "$HOME/mounted" 2>/dev/null""",
    "mount.nfs": "true",
}


# Hosts of TPUs run Linux: some of their commands are of its own kind.
linux = pytest.mark.skipif(sys.platform != "linux", reason="runs what hosts run")


class Worker:
    """A directory that stands for the home of every worker."""

    def __init__(self, place: Path, scripts: Path = FOLDER):
        self.home, self.scripts = place / "home", scripts
        programs = place / "bin"
        for directory in (self.home, programs):
            directory.mkdir()
        for name, text in FAKES.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.environment = os.environ | {"HOME": str(self.home), "PATH": path}

    def start(self, *argv: str) -> subprocess.Popen:
        command = [self.scripts / "slice.sh", argv[0], *SLICE, *argv[1:]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment, start_new_session=True, **pipes)

    def call(self, *argv: str, code: int = 0) -> str:
        running = self.start(*argv)
        said = "".join(running.communicate(timeout=60))
        assert running.returncode == code, said
        return said

    def calls(self) -> list[str]:
        return (self.home / "calls").read_text().splitlines()


@pytest.fixture
def worker(tmp_path):
    return Worker(tmp_path)


def test_wait_ends_with_the_first_error(worker):
    said = worker.call("wait", code=2)
    assert said.count("no such thing") == 1 and "the state of lens cannot be read" in said


@linux
def test_copy_brings_the_files_as_they_are_and_keeps_what_is_not_theirs(tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(FOLDER, root / "launch" / "tpu")
    for name in ("edited", "removed", "a b"):
        (root / name).write_text("first")
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]

    def git(*argv):
        subprocess.run(["git", *identity, "-C", root, *argv], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    worker = Worker(tmp_path, root / "launch" / "tpu")
    worker.call("copy")
    there = worker.home / "lens-jax"
    assert {(there / name).read_text() for name in ("edited", "removed", "a b")} == {"first"}
    assert any("pip install" in call and "[tpu]" in call for call in worker.calls())

    (there / "run.log").write_text("why it died")
    (there / "runs").mkdir()
    (there / ".venv" / "mark").touch()
    (root / "edited").write_text("second")
    (root / "untracked").touch()
    (root / "added").touch()
    (root / "removed").unlink()
    git("add", "added")
    worker.call("copy")
    assert (there / "edited").read_text() == "second" and (there / "added").exists()
    assert not (there / "removed").exists() and not (there / "untracked").exists()
    assert (there / "run.log").read_text() == "why it died" and (there / "runs").is_dir()
    assert (there / ".venv" / "mark").exists() and (there / "a b").exists()
    status = ["git", "-C", root, "status", "--porcelain", "--untracked-files=no"]
    left = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    assert left.split("\n")[:3] == ["A  added", " M edited", " D removed"]  # nothing was put away


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@linux
def test_stop_returns_when_the_run_has_ended(worker):
    code = worker.home / "lens-jax"
    code.mkdir()
    (code / "run.log").write_text("why it died\n")
    saves = (
        "trap 'sleep 3; echo saved in x y; exit' TERM; echo started; while :; do sleep 0.1; done"
    )
    worker.call("run", "--", "bash", "-c", saves)
    pid = int((code / "run.pid").read_text())
    try:
        while "started" not in (code / "run.log").read_text():
            time.sleep(0.05)
        assert "another command is running" in worker.call("run", "--", "true", code=1)
        said = worker.call("stop")
        assert not alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    assert "worker-0: still running: started" in said
    assert "worker-0: has ended: saved in x y\nthe command has ended on all workers" in said
    before, title, *output = (code / "run.log").read_text().splitlines()
    assert before == "why it died" and output == ["started", "saved in x y"]
    assert re.match(r"== \d{4}-\d\d-\d\d \d\d:\d\d:\d\d bash -c trap", title)
    assert "worker-0: has ended" in worker.call("stop")  # again: nothing is left to stop


def test_log_of_all_workers_names_them(worker):
    (worker.home / "lens-jax").mkdir()
    (worker.home / "lens-jax" / "run.log").write_text("step 1\n")
    for which, line in {"0": "step 1\n", "all": "worker-0: step 1\n"}.items():
        running = worker.start("log", "--worker", which)
        assert running.stdout.readline().startswith("gcloud ")
        assert running.stdout.readline() == line
        os.killpg(running.pid, signal.SIGTERM)
        running.communicate()


def test_mount(worker, tmp_path):
    at = str(tmp_path / "share")
    share = ["--share", "10.1.2.2:/lens", "--at", at]
    assert f"worker-0: 10.1.2.2:/lens is at {at}" in worker.call("mount", *share)
    mount = f"sudo mount -t nfs 10.1.2.2:/lens {at}"
    assert worker.calls() == [f"sudo mkdir -p {at}", mount, f"sudo chmod 1777 {at}"]
    (worker.home / "mounted").write_text("10.1.2.2:/lens")
    worker.call("mount", *share)
    assert worker.calls().count(mount) == 1
    (worker.home / "mounted").write_text("10.1.2.3:/other")
    assert "is 10.1.2.3:/other already" in worker.call("mount", *share, code=1)


def test_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "-x", *FOLDER.glob("*.sh")], check=True, cwd=FOLDER.parents[1])
