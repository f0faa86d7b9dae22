"""Files that are whole, or not there, and complaints that name them."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What an operating system's error means for whoever gave the file, and what to do.
_EXPLAINED = {
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EEXIST: "a file of this name is there already: give another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: give another path",
    errno.EISDIR: "a folder, not a file: give a file",
    errno.EACCES: "permission denied: give another path, or change whose it is (ls -l)",
    errno.EPERM: "permission denied: give another path, or change whose it is (ls -l)",
    errno.EROFS: "it lies on a read-only disk: give another path",
    errno.ENAMETOOLONG: "the name is too long: give a shorter one",
    errno.ENOSPC: "the disk is full: make room, then give the same command again",
    errno.EDQUOT: "your share of the disk is full: make room, then give the same command again",
}


_UNFINISHED = ".unfinished"
_begun: dict[Path, int | None] = {}  # hidden directory -> the descriptor that locks it


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged or of another kind; it says which."""


@contextlib.contextmanager
def blaming(file: Path) -> Iterator[None]:
    """Turns errors of values inside into a CheckpointError that names `file`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{file}: the key {error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it holds something else; the message names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def given(section: Any, name: str) -> dict[str, Any]:
    """The keys of a JSON object that have a value; a null is none.

    Raises:
        ValueError: it is no object; the message calls it `name`.
    """
    if not isinstance(section, Mapping | None):
        raise ValueError(f"{name}: expected a JSON object, found {type(section).__name__}")
    return {key: value for key, value in (section or {}).items() if value is not None}


def printable(text: object) -> str:
    """A text that terminals and pages show: names of files may hold control characters, and bytes
    that are no Unicode."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in str(text)
    )


def as_typed(text: str) -> str:
    """A message in which addresses have both slashes again: Path made gs://x into gs:/x."""
    return re.sub(r"\b(https?|ftp|s3|gs|hdfs):/(?=[^/])", r"\1://", text)


def explain(error: OSError) -> str:
    """An operating system's error in words: the file, what is wrong with it and what to do."""
    if not error.strerror:
        return str(error)
    names = [os.fsdecode(x) for x in (error.filename, error.filename2) if x is not None]
    usual = error.strerror == os.strerror(error.errno)  # what a program says itself is clearer
    what = _EXPLAINED.get(error.errno, error.strerror) if usual else error.strerror
    return ": ".join([*filter(None, [" -> ".join(names)]), what])


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write what becomes `file` at the end, all of it or nothing, whenever the process is
    killed or the disk is full; an OSError from inside that names no file names this one."""
    unfinished = file.with_name(f".{file.name}")
    try:
        yield unfinished
        unfinished.replace(file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
            error.filename = str(file)
        raise


def hidden_directory(target: Path) -> Path:
    """A new hidden directory beside `target`, to be filled and renamed. `discard` ends it anyway.

    Those that killed processes have left for the same target are removed: nobody locks them.
    """
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
        lock = _lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    folder = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_UNFINISHED, dir=target.parent)
    )
    folder.chmod(0o755)
    _begun[folder] = _lock(folder)
    return folder


def discard(folder: Path) -> None:
    """Ends a `hidden_directory`: removes it, unless it was renamed."""
    lock = _begun.pop(folder, None)
    for _ in range(5):  # threads that an interrupt left behind may still write into it
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    if lock is not None:
        os.close(lock)


def discard_all() -> None:
    """Ends all hidden directories, of a process that leaves at once."""
    for folder in list(_begun):
        discard(folder)


def lock(folder: Path) -> int:
    """A descriptor that locks a directory until it is closed.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it is missing, or its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(folder: Path) -> int | None:
    try:
        return lock(folder)
    except OSError:
        return None


def is_full(error: BaseException) -> bool:
    """Whether a full disk caused an error; libraries put it into errors of their own."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in f"{error}"


def write_text(file: Path, text: str) -> Path:
    """Writes `whole` of a text. Returns the file.

    Bytes of file names that are no Unicode, half characters, are written as JSON escapes them.
    """
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file
