"""Pretrained checkpoints: lens_config.json, params/, tokenizer and processor files, manifest."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lens_jax import files
from lens_jax.checkpoints import arrays
from lens_jax.checkpoints.manifest import MANIFEST, check_manifest, write_manifest
from lens_jax.distribution import processes
from lens_jax.files import CheckpointError, blaming, read_json
from lens_jax.model_configs.lens import read_lens
from lens_jax.models.lens import LensConfig

CONFIG = "lens_config.json"
PARAMS = "params"

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
      OSError: the disk is full; it names `directory`.
    """
    directory = Path(directory).absolute()

    def begin() -> str:
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise CheckpointError(
                f"{directory} exists already: remove it or name another directory"
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        return str(files.hidden_directory(directory))

    def end() -> None:
        unfinished.rename(directory)

    unfinished = Path(processes.by_main(begin))
    try:
        yield unfinished
        processes.by_main(end)
    except Exception as error:
        if files.is_full(error):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
            raise full from error
        raise
    finally:
        if processes.is_main():
            files.discard(unfinished)


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
        hint = "python -m tools.convert_weights makes one of a downloaded release"
        if (directory.parent / "config.yaml").is_file():
            hint = "its run has not ended: the command that began it goes on"
        raise CheckpointError(
            f"{files.as_typed(str(directory))} is not a directory: no checkpoint there ({hint})"
        )
    file = directory / CONFIG
    if not file.is_file():
        hint = "a pretrained checkpoint is written by training (RUN/final) or tools.convert_weights"
        if (directory / "final" / CONFIG).is_file():
            hint = f"give {directory / 'final'}"
        raise CheckpointError(f"{directory} holds no {CONFIG}: {hint}")
    return read_json(file)


def model_shapes(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> LensConfig:
    """The model's shapes by `config`, the lens_config.json of that directory.

    Raises:
      CheckpointError: a key is missing or has a wrong value; it names the file and the key.
    """
    with blaming(Path(directory) / CONFIG):
        return read_lens(config)


def check_sizes(directory: str | os.PathLike[str]) -> None:
    """Raises CheckpointError where a file of a pretrained checkpoint is missing, or is of another
    size than was written: quicker than reading them all."""
    _complain(directory, check_manifest(directory, content=False))


def iterate_params(directory: str | os.PathLike[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a pretrained checkpoint as written: (name, host array), in portions."""
    yield from read_params(directory, saved_params(directory))


def saved_params(directory: str | os.PathLike[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of a pretrained checkpoint's tensors; verifies its files."""
    read_config(directory)
    _complain(directory, check_manifest(directory))
    saved = ocp.metadata(Path(directory).absolute() / PARAMS).metadata
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in saved.items()}


def read_params(
    directory: str | os.PathLike[str], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Some of the tensors that `saved_params` lists, in the order asked for, in portions."""
    directory = Path(directory).absolute() / PARAMS
    saved = ocp.metadata(directory).metadata
    for portion in _portions((name, saved[name]) for name in names):
        loaded = arrays.load(directory, portion)
        for name in portion:
            yield name, loaded.pop(name)


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
    saved = saved_params(directory)
    groups = arrays.group_layers(saved)
    tensors = read_params(directory, (m for members in groups.values() for m in members))
    leaves = {}
    for name, members in groups.items():
        shape, kind = saved[members[0]].shape, saved[members[0]].dtype
        if dtype is not None and jax.dtypes.issubdtype(kind, np.floating):
            kind = np.dtype(dtype)
        stacked = members != [name]
        leaf = np.empty((len(members), *shape) if stacked else shape, kind)
        for i, (_, tensor) in zip(range(len(members)), tensors, strict=False):
            leaf[i if stacked else ...] = tensor
        if sharding is not None:
            place = sharding(name, leaf.shape)
            leaf = jax.make_array_from_callback(leaf.shape, place, leaf.__getitem__)
        leaves[name] = leaf
    return config, arrays.nest(leaves)


def _write_params(directory: Path, items: Iterable[tuple[str, Any]]) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained weights hardly compress
    # Orbax would copy every tensor on its way out and hold all of its file's bytes on its way in.
    # Nothing changes what is being written here, so that tensors mapped from a file stay there.
    context.memory.deepcopy_host_arrays = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    written: set[str] = set()

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in items:
            if name in written:
                raise CheckpointError(f"the tensor {name} is given twice")
            written.add(name)
            yield name, np.asarray(value)

    with context:
        for portion in _portions(tensors()):
            ocp.partial.save(directory, portion)
        if not written:
            raise CheckpointError(f"no tensors to write into {directory}")
        ocp.partial.finalize(directory)


def _portions(items: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Named arrays, or their shapes, in dictionaries of `PORTION_BYTES` or a little more."""
    portion: dict[str, Any] = {}
    size = 0
    for name, x in items:
        portion[name] = x
        size += math.prod(x.shape) * x.dtype.itemsize
        if size >= PORTION_BYTES:
            yield portion
            portion, size = {}, 0
    if portion:
        yield portion


def _complain(directory: str | os.PathLike[str], trouble: str | None) -> None:
    if trouble is not None:
        raise CheckpointError(
            f"{directory} is damaged: {trouble}. Write it again"
            f" (a file changed on purpose: delete its entry in {MANIFEST})"
        )
