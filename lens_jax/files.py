"""Files that are whole, or not there, and complaints that name them."""

import contextlib
import unicodedata
from collections.abc import Iterator
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged or of another kind; it says which."""


@contextlib.contextmanager
def blaming(file: Path) -> Iterator[None]:
    """What is wrong with values inside is wrong with `file`: a CheckpointError that names it."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file}: the key {error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """An OSError that names no file, as one of a full disk does not, is about this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise


def printable(text: object) -> str:
    """A text that terminals and pages show: names of files may hold control characters, and bytes
    that are no Unicode."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in str(text)
    )


def write_text(file: Path, text: str) -> Path:
    """Writes all of a file or nothing, whenever the process is killed. Returns it.

    Bytes of file names that are no Unicode, half characters, are written as JSON escapes them.
    """
    unfinished = file.with_name(f".{file.name}")
    with naming(file):
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
        unfinished.replace(file)
    return file
