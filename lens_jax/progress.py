"""Output of commands while they work: bars that know of compilation, warnings clear of them."""

import logging
import sys
from typing import Any

from tqdm import tqdm

from lens_jax.files import printable


class Bar(tqdm):
    """A progress bar that says "compiling" until something is done, and does not count the time
    that this took when it says how long the rest will take; an ordinary one if not `compiles`."""

    _first: tuple[float, float] | None = None  # when the first was done, and how many were then

    def __init__(self, *args, compiles: bool = True, **options):
        self._compiles = compiles
        super().__init__(*args, **options)

    def update(self, n: float = 1) -> bool | None:
        if self._first is None and n and not self.disable:
            self._first = (self._time(), self.n + n)
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = super().format_dict
        if not self._compiles:
            return shown
        if self._first is None:
            if not self.total or self.n < self.total:
                name = "{desc}: " if self.desc else ""
                shown["bar_format"] = name + "compiling, {n_fmt}/{total_fmt} {unit}"
            return shown
        began, before = self._first
        since = self._time() - began
        if self.n > before and since > 0:
            shown["rate"] = (self.n - before) / since
        elif self.n != self.total:
            shown["rate"] = 0.0  # unknown
        return shown


class Warnings(logging.Handler):
    """Log records as lines of their own: `warning: ...`."""

    def emit(self, record: logging.LogRecord) -> None:
        write(f"{record.levelname.lower()}: {self.format(record)}")


def show_warnings() -> None:
    """Writes the process's log that way, unless it has been configured already."""
    logging.basicConfig(handlers=[Warnings()], format="%(message)s")


def counted(count: int, what: str) -> str:
    """The number of things of a kind that takes an s for several: 1 row, 1,024 rows."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def write(text: str) -> None:
    """A line on stderr, clear of progress bars."""
    tqdm.write(printable(" ".join(text.split())), file=sys.stderr)
