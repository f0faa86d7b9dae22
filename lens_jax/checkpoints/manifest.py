"""manifest.json: size and SHA-256 of every file of a checkpoint, written last."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

MANIFEST = "manifest.json"


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """A local path made absolute, or a remote one (gs://bucket/name) as it is."""
    remote = "://" in os.fspath(path)
    return epath.Path(path) if remote else epath.Path(Path(path).absolute())


def write_manifest(directory: str | os.PathLike[str], score: float | None = None) -> None:
    """Writes size and SHA-256 of every file under `directory`, atomically.

    `score`, how good what the checkpoint holds is, goes with it.
    """
    directory = absolute(directory)
    files = sorted(_files(directory), key=str)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_sha256, files))
    entries = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().length, "sha256": digest}
        for file, digest in zip(files, digests, strict=True)
    }
    unfinished = directory / f".{MANIFEST}"
    with unfinished.open("w") as f:
        scored = {} if score is None else {"score": score}
        json.dump({**scored, "files": entries}, f, indent=1)
        f.flush()
        with contextlib.suppress(AttributeError, OSError):  # remote files have no descriptor
            os.fsync(f.fileno())
    unfinished.replace(directory / MANIFEST)


def check_manifest(directory: str | os.PathLike[str], *, content: bool = True) -> str | None:
    """The first thing wrong with a checkpoint's files, in words, or None. Extra files may be there.

    Without `content` it compares sizes alone, which is quicker than reading all files.
    """
    try:
        return _trouble(absolute(directory), content)
    except OSError as error:
        return f"it cannot be read: {error}"


def _trouble(directory: epath.Path, content: bool) -> str | None:
    manifest = directory / MANIFEST
    if not manifest.exists():
        return f"it has no {MANIFEST}: it was not written to its end"
    try:
        entries = json.loads(manifest.read_text())["files"]
        expected = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not expected:
        return f"{MANIFEST} lists no files"
    for name, (size, _) in expected.items():
        file = directory / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().length != size:
            return f"{name} has {file.stat().length} bytes instead of {size}"
    if not content:
        return None
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _sha256(directory / name), expected)
        for (name, (_, sha256)), digest in zip(expected.items(), digests, strict=True):
            if digest != sha256:
                return f"the content of {name} is not what was written"
    return None


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    """All files under a directory, manifests apart."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _files(entry)
        elif entry.name not in (MANIFEST, f".{MANIFEST}"):
            yield entry


def _sha256(file: epath.Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
