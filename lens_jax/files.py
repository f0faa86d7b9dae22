"""Files that are whole, or not there."""

from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that is missing, incomplete, damaged or of another kind; it says which."""


def write_text(file: Path, text: str) -> Path:
    """Writes all of a file or nothing, whenever the process is killed. Returns it.

    Bytes of file names that are no Unicode, half characters, are written as JSON escapes them.
    """
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    unfinished.replace(file)
    return file
