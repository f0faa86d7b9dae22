"""Stops a run on request: SIGTERM (exit code 0) or Ctrl-C (exit code 130).

While an update is not saved, a request waits for the end of the step, and the run then saves. At
any other time nothing would be lost: the request is met at once, by a KeyboardInterrupt in the main
thread. Python delivers that only between two of its own instructions, and code that calls back into
Python may swallow it. So a thread of its own hears every signal when it comes, during a long
compilation too, and ends the process where the main thread does not within `GRACE` seconds; and
the run asks `asked` wherever it can stop.

Imports little but the standard library: it listens before JAX is imported.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

from lens_jax import files

INTERRUPTED = 130  # what shells report for a command that ended by Ctrl-C
GRACE = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Whether, and how, a run was asked to stop; a context manager that listens while it is open.

    Attributes:
        asked: a signal has come.
        code: the exit code for it.
        alone: no other process takes part in the run. Several stop together or not at all, so that
            none of them is met at once: they agree on where.
        where: what a stop at this moment says of the run.
        raised: the main thread was interrupted.
    """

    def __init__(self) -> None:
        self.asked = False
        self.code = 0
        self.alone = True
        self.where = "nothing was begun; the same command goes on"
        self.raised = False
        self._held = False
        self._heard = {number: threading.Event() for number in SIGNALS}
        self._closed = threading.Event()
        self._said = threading.Lock()
        self._before: dict[int, object] = {}

    # ---- for the run -----------------------------------------------------------------------------

    def hold(self) -> None:
        """From here on an update is not saved: requests wait for the end of a step."""
        self._held = True

    def release(self) -> None:
        """All that was trained is saved."""
        self._held = False
        if self.asked and self.alone:  # after the run asked for the last time
            self._interrupt()

    def report(self, text: str) -> None:
        """Prints the one line that says where the run stopped; a second time nothing."""
        if self._said.acquire(blocking=False):
            print(text, flush=True)

    # ---- signals ---------------------------------------------------------------------------------

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            self._wakeup, write = os.pipe()
            os.set_blocking(write, False)
            self._write, self._old = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, name="stopping", daemon=True).start()
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old)
            os.write(self._write, b"\0")  # ends the thread, which closes the pipe

    def _on_signal(self, number: int, frame: object) -> None:
        """In the main thread, as soon as it is back in Python."""
        # An event loop of a library may have taken the wake-up descriptor for itself.
        if not self._heard[number].wait(2.0):
            self._hear(number)
        self._heard[number].clear()
        if self.alone and not self._held:
            self._interrupt()

    def _interrupt(self) -> NoReturn:
        self.raised = True
        raise KeyboardInterrupt

    def _listen(self) -> None:
        """In a thread: hears signals, and leaves where the main thread cannot."""
        leave_at = None
        while not self._closed.is_set():
            timeout = None if leave_at is None else max(0.0, leave_at - time.monotonic())
            if not select.select([self._wakeup], [], [], timeout)[0]:
                if not self._held:
                    self._leave(f"stopped: {self.where}")
                leave_at = None
                continue
            for number in os.read(self._wakeup, 64):
                if number in SIGNALS:
                    self._hear(number)
                    self._heard[number].set()
            if self.asked and self.alone and not self._held and leave_at is None:
                leave_at = time.monotonic() + GRACE
        os.close(self._wakeup)
        os.close(self._write)

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT and self.asked:
            self._leave("stopped at once: what was not saved is lost", INTERRUPTED)
        if number == signal.SIGINT:
            self.code = INTERRUPTED
            if self._held or not self.alone:
                when = "after this step" if self._held else "when all processes can"
                self._tell(f"stopping {when}; Ctrl-C again stops at once")
        self.asked = True

    def _tell(self, text: str) -> None:
        """Writes a line in place of a progress bar, past locks that the main thread may hold."""
        clear = "\r\x1b[K" if sys.stderr.isatty() else "\n" * self._held
        with contextlib.suppress(OSError):
            os.write(2, f"{clear}{text}\n".encode())

    def _leave(self, text: str, code: int | None = None) -> None:
        """Ends the process here and now, unless it is leaving by itself."""
        if self._closed.is_set():
            return
        if self._said.acquire(blocking=False):
            self._tell(text)
        files.discard_all()
        os._exit(self.code if code is None else code)
