"""Ctrl-C in processes of their own: one line, exit code 130, nothing half-written."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lens_jax import interrupts

ROOT = Path(__file__).parents[1]


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["launch/predict.py", "launch/data.py", "-m tools.kill_test"])
def test_while_a_command_imports(command):
    """`lens_jax.cli`, which all of them import, stands for what takes long."""
    name = command.split()[-1]
    how = f"run_module({name!r}, " if " " in command else f"run_path({name!r}, "
    process = start(f"""
        import importlib.abc, os, runpy, signal, sys

        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == "lens_jax.commands.cli":
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Slow())
        sys.argv = ["-m"]
        runpy.{how}run_name="__main__")
    """)
    assert process.communicate(timeout=60) == ("", "stopped\n")
    assert process.returncode == 130


def test_the_second_ends_what_does_not_listen():
    """Compiled code, in which no Python runs; the first is answered with what is waited for."""
    process = start("""
        import sys, threading
        from lens_jax import interrupts

        def deaf():
            interrupts.tell(lambda: "1 of 3 pictures done")
            with interrupts.held():
                print("ready", flush=True)
                threading.Event().wait(60)

        sys.exit(interrupts.run(lambda: deaf() or 0))
    """)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping as soon as this can be left; Ctrl-C")
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "stopped: 1 of 3 pictures done\n"
    assert process.returncode == 130 and time.monotonic() - begin < 5


def test_what_a_callback_drops_comes_again(capfd):
    """JAX's callback at garbage collection drops it, for one."""
    loops = 0

    def callback(phase, info):
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)

    def command() -> int:
        nonlocal loops
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        while loops < 500:
            loops += 1
            time.sleep(0.01)
        return 0

    assert interrupts.run(command) == 130
    assert loops < 400
    assert capfd.readouterr().err == "stopped\n"


def test_a_write_is_ended_first_and_errors_after_it_are_none(capfd):
    done = []

    def command() -> int:
        interrupts.tell(lambda: f"{len(done)} done")
        try:
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append(1)
        except KeyboardInterrupt:
            raise ValueError("what compiled code makes of it") from None
        return 0

    assert interrupts.run(command) == 130
    assert capfd.readouterr().err == "stopped: 1 done\n"
    interrupts.check()  # forgotten afterwards
    assert interrupts.run(lambda: 3) == 3
    with pytest.raises(ValueError, match="its own"):
        interrupts.run(lambda: (_ for _ in ()).throw(ValueError("its own")))
