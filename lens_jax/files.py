"""Files that are whole, or not there."""

from pathlib import Path


def write_text(file: Path, text: str) -> Path:
    """Writes all of a file or nothing, whenever the process is killed. Returns it."""
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)
    return file
