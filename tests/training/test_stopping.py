"""SIGTERM and Ctrl-C: what is at once, what waits, and that nothing swallows them."""

import gc
import os
import signal
import time

import pytest

from lens_jax.training import stopping
from lens_jax.training.stopping import Stopping


@pytest.fixture
def left(monkeypatch):
    """Exit codes that the process would have ended with at once."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # back in Python, where handlers run


def wait(codes):
    end = time.monotonic() + 10
    while not codes and time.monotonic() < end:
        time.sleep(0.01)
    return codes[:1]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_at_once_where_nothing_is_lost(number, code, left, capfd):
    before = signal.getsignal(number)
    with Stopping() as asked, pytest.raises(KeyboardInterrupt):
        send(number)
    assert asked.asked and asked.raised and asked.code == code and not left
    assert capfd.readouterr().err == ""
    assert signal.getsignal(number) is before


def test_an_update_is_saved_first(left, capfd):
    with Stopping() as asked:
        asked.hold()
        send(signal.SIGINT)
        assert asked.asked and asked.code == 130 and not left
        said = "stopping after this step; Ctrl-C again stops at once\n"
        assert capfd.readouterr().err == f"\n{said}"  # below a progress bar
        send(signal.SIGTERM)
        assert asked.code == 130 and not left
        with pytest.raises(KeyboardInterrupt):  # all is saved, and the run went on
            asked.release()


def test_the_second_ctrl_c_ends_the_process(left, capfd):
    with Stopping() as asked:
        asked.hold()
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert wait(left) == [130]
        assert "stopped at once" in capfd.readouterr().err


def test_several_processes_stop_together(left, capfd):
    """None of them is interrupted: the others would wait for it."""
    with Stopping() as asked:
        asked.alone = False
        send(signal.SIGTERM)
        assert asked.asked and asked.code == 0 and not left


def test_a_swallowed_interrupt_ends_the_process_all_the_same(left, capfd, monkeypatch):
    """As by a callback of the garbage collector, of which JAX has one."""
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)

    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    with Stopping() as asked:
        asked.where = "runs/x goes on at its last checkpoint"
        gc.callbacks.append(interrupt)
        gc.collect()
        assert asked.asked
        assert wait(left) == [130]
    assert capfd.readouterr().err.splitlines()[0] == f"stopped: {asked.where}"
