"""Ctrl-C: it ends a command in one line with exit code 130, and leaves no half-written file.

An exception alone does not do: Python prints and drops what callbacks raise, JAX's at garbage
collection for one, and a program that is being compiled lets no Python run. So a thread counts, and
what was asked for stays known. Threads that are left in the middle of their work complain: of that
nothing is shown.
"""

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lens_jax import files

T = TypeVar("T")

EXIT_CODE = 130
PATIENCE = 1.0  # seconds until it is said that something cannot be left at once
AGAIN = 0.02  # seconds until an interrupt that a callback dropped is repeated
_DROPPED = b"\0"

_heard = threading.Event()
_answered = threading.Event()
_held = 0
_own_process = False
_told: Callable[[], str] | None = None


def quit_at_once() -> None:
    """From here on, outside of `run`, Ctrl-C ends the process: imports leave nothing to tidy up.

    And `run` ends it where else it would return 130: no thread is waited for.
    """
    global _own_process
    _own_process = True
    signal.signal(signal.SIGINT, lambda *_: _end("stopped"))


def tell(done: Callable[[], str]) -> None:
    """What the line says after "stopped: ", should Ctrl-C come: what is done, and where it lies."""
    global _told
    _told = done


def check() -> None:
    """Raises KeyboardInterrupt once Ctrl-C was pressed; loops call it that run for long."""
    if _heard.is_set():
        raise KeyboardInterrupt


def checked(items: Iterable[T]) -> Iterator[T]:
    """The items, as long as Ctrl-C was not pressed."""
    for item in items:
        check()
        yield item


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Lets what is inside, writing a file, come to its end first."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if not _held:
        check()


def run(command: Callable[[], int]) -> int:
    """What `command` returns, or 130 with a line on stderr if Ctrl-C ended it.

    A second Ctrl-C ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        return command()
    with _listening():
        try:
            return command()
        except KeyboardInterrupt:
            pass
        except Exception:  # compiled code makes errors of its own of an interrupt
            if not _heard.is_set():
                raise
        _answered.set()
        _say(_line())
        if _own_process:
            files.discard_all()
            sys.stdout.flush()
            os._exit(EXIT_CODE)
        return EXIT_CODE


@contextlib.contextmanager
def _listening() -> Iterator[None]:
    global _told
    _heard.clear()
    _answered.clear()
    _told = None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    handler = signal.signal(signal.SIGINT, _hear)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hooks = sys.unraisablehook, sys.excepthook, threading.excepthook

    def quiet(kind: type[BaseException]) -> bool:
        if _heard.is_set() and issubclass(kind, KeyboardInterrupt):
            os.write(writer, _DROPPED)
        return _heard.is_set()

    sys.unraisablehook = lambda what: quiet(what.exc_type) or hooks[0](what)
    sys.excepthook = lambda kind, *what: quiet(kind) or hooks[1](kind, *what)
    threading.excepthook = lambda what: quiet(what.exc_type) or hooks[2](what)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        _heard.clear()
        sys.unraisablehook, sys.excepthook, threading.excepthook = hooks
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(writer)


def _hear(*_: object) -> None:
    _heard.set()
    if not _held:
        raise KeyboardInterrupt


def _watch(reader: int) -> None:
    """Counts; the bytes that it reads are the numbers of signals."""
    pressed = own = 0
    patience: float | None = None
    while True:
        if not select.select([reader], [], [], patience)[0]:
            patience = None
            if not _answered.is_set():
                _say("stopping as soon as this can be left; Ctrl-C again stops at once")
            continue
        byte = os.read(reader, 1)
        if not byte:
            break
        if byte == _DROPPED:
            time.sleep(AGAIN)
            if _heard.is_set() and not _answered.is_set():
                own += 1
                _thread.interrupt_main()
        elif byte[0] == signal.SIGINT and own:
            own -= 1
        elif byte[0] == signal.SIGINT:
            pressed += 1
            if pressed > 1:
                _end(_line())
            patience = PATIENCE
    os.close(reader)


def _line() -> str:
    return f"stopped: {_told()}" if _told else "stopped"


def _say(line: str) -> None:
    # On a terminal ^C stands at the beginning of the line.
    print(f"\r{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def _end(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))
    files.discard_all()
    os._exit(EXIT_CODE)
