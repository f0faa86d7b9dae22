"""Checkpoints on disk: the state of a training run, and pretrained model directories.

Both are orbax checkpoints of flat, plain arrays, so that files do not depend on Python classes.
Both carry `manifest.json`, the size and SHA-256 of every file, written last: orbax itself does not
notice a flipped byte, and a directory without a manifest was not written to its end.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from lens_jax.distribution import processes
from lens_jax.files import CheckpointError, blaming
from lens_jax.models.lens import LensConfig

MANIFEST = "manifest.json"
CONFIG = "lens_config.json"
PARAMS = "params"

# Subtrees whose leaves are stacked over layers in memory (axis 0) and one array a layer on disk.
STACKED = ("visual/blocks", "language/layers", "context/blocks")

# What travels with the weights: tokenizer, processor and generation settings in Hugging Face form.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

# Tensors are written and read in portions of this size: what is held beyond the model itself.
PORTION_BYTES = 256 * 2**20
CHUNK_BYTES = 32 * 2**20

log = logging.getLogger("lens_jax")


# --- manifest -------------------------------------------------------------------------------------


def write_manifest(directory: str | os.PathLike[str], score: float | None = None) -> None:
    """Writes size and SHA-256 of every file under `directory`, atomically.

    `score`, how good what the checkpoint holds is, goes with it.
    """
    directory = _path(directory)
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


def check_manifest(directory: str | os.PathLike[str]) -> str | None:
    """The first thing wrong with a checkpoint's files, in words, or None. Extra files may be."""
    try:
        return _trouble(_path(directory))
    except OSError as error:
        return f"it cannot be read: {error}"


def _trouble(directory: epath.Path, *, content: bool = True) -> str | None:
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


def _path(path: str | os.PathLike[str]) -> epath.Path:
    """A local path made absolute, or a remote one (gs://bucket/name) as it is."""
    remote = "://" in os.fspath(path)
    return epath.Path(path) if remote else epath.Path(Path(path).absolute())


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


# --- training checkpoints -------------------------------------------------------------------------


class TrainingCheckpoints:
    """The checkpoints of one stage: `directory/<step>/`, the last `keep`, the `keep_best` best, and
    those of `milestones`.

    A state is any pytree of arrays, typed random keys, ints and floats (parameters, optimizer
    state, step, random key, data position). It is saved as a flat dict from path to leaf. Every
    process of a run calls every method; each writes and reads what its devices hold, process 0
    the rest. The directory may be remote (gs://bucket/name).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep: int,
        keep_best: int = 0,
        milestones: Iterable[int] = (),
    ):
        self.directory = _path(directory)
        self.keep, self.keep_best, self.milestones = keep, keep_best, frozenset(milestones)
        try:
            self.directory.exists()
        except ImportError as error:
            raise CheckpointError(f"{self.directory} cannot be reached: {error}") from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[epath.Path, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Steps with a directory, ascending; not all of them need be complete."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())

    def save(self, step: int, state: Any, score: float | None = None) -> None:
        """Starts writing `state`; returns once its values are copied, so that they may be donated.

        Waits for the save before it, and raises what that one met. Checkpoints of this step or
        later belong to a course of training that has been left, and are removed.

        Args:
            score: of this state, for `keep_best`, the highest being best; None: never kept by it.

        Raises:
            CheckpointError: this checkpoint, or the one before it, could not be written.
        """
        self.wait()
        target = self.directory / str(step)
        leaves = {
            name: np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else leaf
            for name, leaf in _flatten(state).items()
        }
        try:
            processes.by_main(lambda: self._make_room(step))
        except Exception as error:
            raise self._failed(target, f"{error}") from error
        try:
            response = ocp.save_async(target, leaves)
        except Exception as error:
            if jax.process_count() > 1:  # the others wait inside of it: they end with this one
                raise
            raise self._failed(target, f"{error}") from error
        self._pending = target, self._thread.submit(self._finish, response, target, score)

    def _make_room(self, step: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        for old in self.steps():
            if old >= step:
                self._remove(old)

    def _finish(
        self, response: ocp.AsyncResponse[None], target: epath.Path, score: float | None
    ) -> None:
        response.result()
        if not processes.is_main():
            return
        write_manifest(target, score)
        try:
            self._prune()
        except OSError as error:
            log.warning("checkpoints that are not needed any more stay: %s", error)

    def _prune(self) -> None:
        complete = {s: self._score(s) for s in self.steps()}
        complete = {s: score for s, score in complete.items() if score is not None}
        scored = sorted((score, s) for s, score in complete.items() if score > -math.inf)
        best = [s for _, s in scored[::-1][: self.keep_best]]
        kept = {*best, *list(complete)[-self.keep :], *self.milestones}
        for step in self.steps():
            # What is not complete, a killed save has left after orbax's part of the work.
            if step not in kept or step not in complete:
                self._remove(step)

    def _score(self, step: int) -> float | None:
        """Of a complete checkpoint, -inf without one; None if it is not complete.

        Raises:
            OSError: its manifest is there, or may be, and cannot be read.
        """
        try:
            manifest = json.loads((self.directory / str(step) / MANIFEST).read_text())
            return float(manifest.get("score", -math.inf))
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return None

    def _remove(self, step: int) -> None:
        # Without its manifest a directory is no checkpoint, however far its removal gets.
        (self.directory / str(step) / MANIFEST).unlink(missing_ok=True)
        (self.directory / str(step)).rmtree()

    def _remove_unfinished(self) -> None:
        """Removes what saves that were killed or failed have left."""
        if self.directory.is_dir():
            for entry in self.directory.iterdir():
                if ".orbax-checkpoint-tmp" in entry.name:
                    entry.rmtree()

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
            CheckpointError: it could not be written, by whichever process.
        """
        if self._pending is None:
            return
        (target, pending), self._pending = self._pending, None
        error = pending.exception()
        reason = _first_reason(error)
        if reason is not None:
            raise self._failed(target, reason) from error

    def _failed(self, target: epath.Path, reason: str) -> "CheckpointError":
        """What to say about a checkpoint that could not be written; makes room."""
        last = "those before it cannot be read now"
        with contextlib.suppress(OSError):
            if processes.is_main():
                self._remove_unfinished()
            kept = [str(step) for step in self.steps() if self._score(step) is not None]
            last = f"the last one is {self.directory / kept[-1]}" if kept else "there is none yet"
        return CheckpointError(
            f"checkpoint {target} could not be written, {last}: {' '.join(reason.split())}"
        )

    def latest(self) -> int | None:
        """The last complete step. Names every half-written or damaged one that it passes over.

        Raises:
            CheckpointError: all that were written to their end are damaged.
        """
        self.wait()
        return processes.by_main(self._latest)

    def _latest(self) -> int | None:
        damaged = 0
        for step in reversed(self.steps()):
            directory = self.directory / str(step)
            trouble = check_manifest(directory)
            if trouble is None:
                return step
            log.warning("checkpoint %s is left out: %s", directory, trouble)
            damaged += (directory / MANIFEST).exists()
        if damaged:
            raise CheckpointError(
                f"{self.directory}: every checkpoint there is damaged, as said above; bring one "
                "back, or remove the directory to begin this stage anew"
            )
        return None

    def best(self) -> int | None:
        """The complete step with the highest score, the later one of equals; None without any."""
        scores = {step: self._score(step) for step in self.steps()}
        scored = [step for step, score in scores.items() if score not in (None, -math.inf)]
        return max(scored, key=lambda step: (scores[step], step), default=None)

    def restore(self, step: int, like: Any) -> Any:
        """The state saved at `step` (from `latest`, which verifies it) in the structure of `like`.

        `like` holds arrays or ShapeDtypeStructs (restored with their dtype and sharding; numpy
        arrays where they have no sharding), ints and floats. It may be a part of what was saved; a
        leaf that was not saved, or has another shape, is an error.
        """
        directory = self.directory / str(step)
        wanted = _flatten(like)
        if not (directory / MANIFEST).exists():
            raise CheckpointError(f"{directory} is not a checkpoint")
        saved = ocp.metadata(directory).metadata
        missing = sorted(wanted.keys() - saved.keys())
        if missing:
            raise CheckpointError(f"{directory} does not hold {_few(missing)}")
        abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
        for name, leaf in abstract.items():
            if np.shape(leaf) != np.shape(saved[name]):
                raise CheckpointError(
                    f"{directory}: {name} has shape {np.shape(saved[name])}, "
                    f"this run needs {np.shape(leaf)}"
                )
        loaded = _load(directory, abstract)
        leaves = [
            jax.random.wrap_key_data(loaded[name], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else loaded[name]
            for name, leaf in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def params(self, step: int) -> dict[str, np.ndarray]:
        """The trained parameters of a `TrainState`, alone: by path, layers stacked."""
        directory, prefix = self.directory / str(step), "state/params/"
        trouble = check_manifest(directory)
        if trouble is not None:
            raise CheckpointError(f"{directory} is no checkpoint: {trouble}")
        saved = ocp.metadata(directory).metadata
        wanted = {name: leaf for name, leaf in saved.items() if name.startswith(prefix)}
        loaded = _load(directory, {n: np.empty(x.shape, x.dtype) for n, x in wanted.items()})
        return {n.removeprefix(prefix).removesuffix("/value"): x for n, x in loaded.items()}


def _first_reason(error: BaseException | None) -> str | None:
    """What went wrong in whichever process; None if nothing did.

    Where one fails the others wait for it in vain: what they say is asked last.
    """
    reasons = processes.gather(error and (f"{error}" or type(error).__name__))
    found = [f"process {i}: {x}" if i else x for i, x in enumerate(reasons) if x is not None]
    return min(found, key=lambda reason: "barrier" in reason.lower(), default=None)


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaf: Any) -> Any:
    """What orbax is asked for: without a sharding (keys too), a host array."""
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return np.empty(data.shape, data.dtype)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        if leaf.sharding is None:
            return np.empty(leaf.shape, leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return leaf


def _load(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(directory, abstract)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# --- pretrained directories -----------------------------------------------------------------------


def unstack(nested: Mapping[Any, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """A nested state dict as (name, tensor) pairs, one tensor a layer.

    `{"language": {"layers": {"q_proj": {"kernel": [L, D, H]}}}}` gives
    `("language/layers/0/q_proj/kernel", [D, H])` and so on; names outside `STACKED` are the path.
    """
    for name, leaf in _flatten(nested).items():
        if jax.process_count() == 1:
            leaf = np.asarray(leaf)
        prefix = _stacked_prefix(name)
        if prefix is None:
            yield name, processes.whole(leaf)
        else:
            rest = name.removeprefix(prefix + "/")
            for i in range(leaf.shape[0]):
                yield f"{prefix}/{i}/{rest}", processes.whole(leaf[i])


def stack(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `unstack`: nested dicts, layers stacked on axis 0, list indices as ints."""
    leaves = {}
    for name, members in _groups(flat).items():
        leaves[name] = flat[members[0]] if name in flat else np.stack([flat[m] for m in members])
    return _nest(leaves)


def save_pretrained(
    directory: str | os.PathLike[str],
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    config: Mapping[str, Any],
    *,
    files_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a pretrained checkpoint: `lens_config.json`, `params/`, processor files, manifest.

    Of several processes all call it, with the same tensors; process 0 writes.

    Args:
      directory: must not exist yet, or be empty. It appears only when everything is written.
      params: name -> tensor, one a layer (`unstack`). An iterable is consumed as it is written, in
        portions of `PORTION_BYTES`, so that the model is never held as a whole.
      config: what goes into `lens_config.json`.
      files_from: a directory whose tokenizer and processor files (`PROCESSOR_FILES`) are copied.
    """
    with new_directory(directory) as unfinished:
        items = params.items() if isinstance(params, Mapping) else params
        _write_params(unfinished / PARAMS, items)
        if not processes.is_main():
            return
        if files_from is not None:
            copy_processor_files(files_from, unfinished)
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_manifest(unfinished)


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden directory beside `directory`, to be filled; it takes that name when all went well.

    Of several processes all get the same one.

    Raises:
      CheckpointError: `directory` exists already and is not empty.
    """
    directory = Path(directory).absolute()

    def begin() -> str:
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise CheckpointError(
                f"{directory} exists already: remove it or name another directory"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent)

    def end() -> None:
        unfinished.chmod(0o755)
        unfinished.rename(directory)

    unfinished = Path(processes.by_main(begin))
    try:
        yield unfinished
        processes.by_main(end)
    except BaseException:
        if processes.is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def copy_processor_files(
    source: str | os.PathLike[str], destination: str | os.PathLike[str]
) -> None:
    """Copies those of `PROCESSOR_FILES` that there are."""
    for name in PROCESSOR_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(destination) / name)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """`lens_config.json` of a pretrained checkpoint."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory: no checkpoint there (python -m tools.convert_weights "
            "makes one of a downloaded release)"
        )
    file = directory / CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{directory} holds no {CONFIG}: a pretrained checkpoint is written by training "
            "(RUN/final) or by tools.convert_weights"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def model_shapes(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> LensConfig:
    """What `config`, lens_config.json of that directory, says of the model's shapes.

    Raises:
      CheckpointError: a key is missing or has a wrong value; it names the file and the key.
    """
    with blaming(Path(directory) / CONFIG):
        return LensConfig.from_dict(config)


def check_sizes(directory: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where a file of a pretrained checkpoint is missing, or is of another
    size than was written: quicker than reading them all."""
    _damaged(directory, _trouble(_path(directory), content=False))


def iterate_params(directory: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a pretrained checkpoint as written: (name, host array), in portions."""
    yield from read_params(directory, saved_params(directory))


def saved_params(directory: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of a pretrained checkpoint's tensors; verifies its files."""
    saved = _saved(_verified(directory))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items()}


def read_params(
    directory: str | os.PathLike[str], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Some of the tensors that `saved_params` lists, in the order asked for, in portions."""
    directory = Path(directory).absolute()
    yield from _read(directory, _saved(directory), names)


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Reads a pretrained checkpoint: (lens_config.json, nested state dict, layers stacked).

    Args:
      dtype: floating tensors are cast to it, as they are read; None keeps what was stored.
      sharding: from (path such as "language/layers/q_proj/kernel", stacked shape) to where the
        array goes; every process puts its own shards there. None gives host (numpy) arrays.
    """
    config = read_config(directory)
    directory = _verified(directory)
    saved = _saved(directory)
    groups = _groups(saved)
    arrays = _read(directory, saved, (m for members in groups.values() for m in members))
    leaves = {}
    for name, members in groups.items():
        shape, kind = saved[members[0]].shape, saved[members[0]].dtype
        if dtype is not None and jax.dtypes.issubdtype(kind, np.floating):
            kind = np.dtype(dtype)
        stacked = members != [name]
        leaf = np.empty((len(members), *shape) if stacked else shape, kind)
        for i, (_, array) in zip(range(len(members)), arrays, strict=False):
            leaf[i if stacked else ...] = array
        if sharding is not None:
            place = sharding(name, leaf.shape)
            leaf = jax.make_array_from_callback(leaf.shape, place, leaf.__getitem__)
        leaves[name] = leaf
    return config, _nest(leaves)


def _write_params(directory: Path, items: Iterable[tuple[str, Any]]) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained weights hardly compress
    # Orbax would copy every tensor on its way out and hold all of its file's bytes on its way in.
    # Nothing changes what is being written here, so that tensors mapped from a file stay there.
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    portion: dict[str, np.ndarray] = {}
    written: set[str] = set()
    size = 0
    with context:
        for name, value in items:
            if name in written:
                raise CheckpointError(f"the tensor {name} is given twice")
            written.add(name)
            portion[name] = np.asarray(value)
            size += portion[name].nbytes
            if size >= PORTION_BYTES:
                ocp.partial.save(directory, portion)
                portion, size = {}, 0
        if portion:
            ocp.partial.save(directory, portion)
        if not written:
            raise CheckpointError(f"no tensors to write into {directory}")
        ocp.partial.finalize(directory)


def _verified(directory: str | os.PathLike[str]) -> Path:
    directory = Path(directory).absolute()
    read_config(directory)
    _damaged(directory, check_manifest(directory))
    return directory


def _damaged(directory: str | os.PathLike[str], trouble: str | None) -> None:
    if trouble is not None:
        raise CheckpointError(
            f"{directory} is damaged: {trouble}. Write it again"
            f" (a file changed on purpose: delete its entry in {MANIFEST})"
        )


def _saved(directory: Path) -> dict[str, Any]:
    """Name -> shape and dtype of the tensors on disk."""
    return ocp.metadata(directory / PARAMS).metadata


def _read(
    directory: Path, saved: Mapping[str, Any], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors in that order, read a portion at a time."""
    portion: dict[str, Any] = {}
    size = 0

    def load() -> Iterator[tuple[str, np.ndarray]]:
        arrays = _load(directory / PARAMS, portion)
        for name in portion:
            yield name, arrays.pop(name)

    for name in names:
        portion[name] = saved[name]
        size += math.prod(saved[name].shape) * saved[name].dtype.itemsize
        if size >= PORTION_BYTES:
            yield from load()
            portion, size = {}, 0
    if portion:
        yield from load()


def layer_of(name: str) -> tuple[str, int | None]:
    """The path in memory of a tensor on disk, and its layer there if it is one of a stack."""
    prefix = _stacked_prefix(name)
    match = re.fullmatch(r"(\d+)/(.+)", name.removeprefix(f"{prefix}/")) if prefix else None
    return (name, None) if match is None else (f"{prefix}/{match[2]}", int(match[1]))


def _stacked_prefix(name: str) -> str | None:
    return next((p for p in STACKED if name.startswith(p + "/")), None)


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Name in memory -> names on disk, in layer order; a gap in the layers is an error."""
    layers: dict[str, dict[int, str]] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        path, layer = layer_of(name)
        if layer is None:
            groups[name] = [name]
        else:
            layers.setdefault(path, {})[layer] = name
    depth = {
        p: 1 + max((max(m) for n, m in layers.items() if n.startswith(p)), default=-1)
        for p in STACKED
    }
    for name, members in layers.items():
        missing = set(range(depth[_stacked_prefix(name)])) - members.keys()
        if missing:
            raise CheckpointError(f"{name}: layer {min(missing)} is missing")
        groups[name] = [members[i] for i in sorted(members)]
    return groups


def _nest(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = (int(p) if p.isdecimal() else p for p in name.split("/"))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested
