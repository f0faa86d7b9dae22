"""Generated scenes, drawn once for all runs that lie beside each other.

`RUNS/.scenes/<key>/` holds what was drawn, with a manifest of checksums; the key says all that a
drawing depends on. A run gets hard links, so that its directory stays whole whatever becomes of the
shared one, and costs no disk.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import PIL

from lens_jax import checkpoints, files
from lens_jax.preparation import shapes, shapes_refcoco

FOLDER = ".scenes"
TREE = "refer_seg"
# Where nothing can be shared, a run draws for itself: the folder beside it cannot be written, or
# its file system knows no locks.
_UNSHARED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def provide(run: Path, scenes: Mapping[str, int], seed: int) -> str:
    """Generated scenes as RUN/data, in RefCOCO's layout; says in words where they are from.

    Args:
        run: the run's directory.
        scenes, seed: see `shapes_refcoco.write_refcoco`.

    Raises:
        ValueError: RUN/data holds a RefCOCO that was not generated.
    """
    data = run / "data"
    found = shapes_refcoco.drawn_in(data)
    if found and found["scenes"] == dict(scenes) and found["seed"] == seed:
        return f"scenes: those in {data}"
    if found is not None:
        shutil.rmtree(data / TREE)
    shared = run.parent / FOLDER / _key(scenes, seed)
    try:
        with _locked(shared):
            drawn = not _is_whole(shared)
            if drawn:
                _draw(shared, scenes, seed)
            _link(shared, data)
    except OSError as error:
        if error.errno not in _UNSHARED:
            raise
        shapes_refcoco.write_refcoco(data, scenes, seed)
        return f"scenes: drawn into {data}; they cannot be shared in {shared.parent}: {error}"
    return f"scenes: {'drawn into' if drawn else 'reused from'} {shared}"


def _key(scenes: Mapping[str, int], seed: int) -> str:
    """A digest of all that a drawing depends on."""
    sources = [Path(module.__file__).read_bytes() for module in (shapes, shapes_refcoco)]
    code = hashlib.sha256(b"".join(sources)).hexdigest()
    settings = [sorted(scenes.items()), seed, code, np.__version__, PIL.__version__]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(shared: Path) -> Iterator[None]:
    """For one run at a time; another one that needs the same scenes waits until they are drawn."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    if shared.parent.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "the folder is another user's", str(shared.parent))
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(shared: Path) -> bool:
    return shared.is_dir() and checkpoints.check_manifest(shared) is None


def _draw(shared: Path, scenes: Mapping[str, int], seed: int) -> None:
    """Draws scenes in place of damaged ones; the caller holds the lock."""
    shutil.rmtree(shared, ignore_errors=True)
    with _unfinished(shared) as folder:
        shapes_refcoco.write_refcoco(folder, scenes, seed)
        for file in folder.rglob("*"):
            if file.is_file():  # every run shares it: nobody is to write into it
                file.chmod(0o444)
        checkpoints.write_manifest(folder)
        folder.rename(shared)


def _link(shared: Path, data: Path) -> None:
    """DATA/refer_seg as hard links to the shared files, or as copies on another file system."""

    def link(source: Path, target: Path) -> None:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(source, target)

    data.mkdir(parents=True, exist_ok=True)
    with _unfinished(data) as folder:
        for source in (shared / TREE).rglob("*"):
            target = folder / source.relative_to(shared / TREE)
            target.mkdir() if source.is_dir() else link(source, target)
        folder.rename(data / TREE)


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A hidden directory beside `target`, to be filled and renamed; removed if it is not."""
    folder = files.hidden_directory(target)
    try:
        yield folder
    finally:
        files.discard(folder)
