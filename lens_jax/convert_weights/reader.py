"""Lazy access to official weight files: shapes first, values one tensor at a time.

Nothing is held: safetensors and zip-format torch files are memory-mapped, so a tensor costs
anonymous memory only while its caller keeps a copy.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lens_jax.convert_weights.table import Shape, Table, WeightsError
from lens_jax.files import read_json

SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# In the order in which transformers looks for them: an index may be left over from an earlier save.
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What a download may hold in the place of a file: its first bytes, and what to do about it.
_NO_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull there"),
    (b"<", "a web page, not the file itself: take the address that downloads it"),
)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk; `load` maps or reads it."""

    shape: Shape
    dtype: np.dtype
    load: Callable[[], np.ndarray]


class Weights(Mapping[str, LazyTensor]):
    """Named tensors of one checkpoint, read on demand. `where` names it in messages."""

    def __init__(self, tensors: Mapping[str, LazyTensor], where: str):
        self._tensors = dict(tensors)
        self.where = where

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.shape for name, tensor in self.items()}

    def select(self, keep: Callable[[str], bool]) -> "Weights":
        """The tensors whose names satisfy `keep`."""
        return Weights({name: t for name, t in self.items() if keep(name)}, self.where)

    def rename(self, new_name: Callable[[str], str]) -> "Weights":
        """The same tensors under other names; two that meet under one name are an error."""
        renamed: dict[str, LazyTensor] = {}
        errors = []
        for name, tensor in self.items():
            if new_name(name) in renamed:
                errors.append(f"{self.where}: tensor {new_name(name)} is there in two spellings")
            renamed[new_name(name)] = tensor
        if errors:
            raise WeightsError(*errors)
        return Weights(renamed, self.where)


@dataclass(frozen=True)
class TabledWeights:
    """A source with the table that must account for all of it."""

    source: Weights
    table: Table


def from_arrays(tensors: Mapping[str, np.ndarray], where: str = "memory") -> Weights:
    """Arrays already in memory, as a source."""
    lazy = {n: LazyTensor(tuple(x.shape), x.dtype, lambda x=x: x) for n, x in tensors.items()}
    return Weights(lazy, where)


def open_weights(path: Path) -> Weights:
    """Opens a weight file, or the directory that holds one (Hugging Face names, sharded or not).

    Raises:
      WeightsError: nothing to read there, or a broken file; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or directory")
    with path.open("rb") as file:
        start = file.read(32).lstrip()
    for begin, what in _NO_FILES:
        if start.startswith(begin):
            raise WeightsError(f"{path}: is {what}")
    if path.suffix == ".safetensors":
        return Weights(_read_safetensors(path), str(path))
    if path.suffix in _TORCH_SUFFIXES:
        return Weights(_read_torch(path), str(path))
    raise WeightsError(f"{path}: not a weight file: expected .safetensors, .pt, .pth or .bin")


def _open_directory(directory: Path) -> Weights:
    for name in _MODEL_FILES:
        if (directory / name).exists():
            if name.endswith(".json"):
                return _open_shards(directory / name)
            return Weights(open_weights(directory / name), str(directory))
    suffixes = (".safetensors", *_TORCH_SUFFIXES)
    files = sorted(f for f in directory.iterdir() if f.suffix in suffixes)
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise WeightsError(
            f"{directory}: expected model.safetensors, its index or one file, found {found}"
        )
    return open_weights(files[0])


def _open_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: has no weight_map")
    errors, tensors = [], {}
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(f"{index}: shard {file!r} is not a plain file name")
        if not (index.parent / file).exists():
            errors.append(f"{index.parent / file}: no such file, though {index.name} names it")
            continue
        shard = open_weights(index.parent / file)
        listed = {name for name, where in weight_map.items() if where == file}
        errors += [f"{shard.where}: missing tensor {n}" for n in sorted(listed - set(shard))]
        for name in sorted(set(shard) - listed):
            if name in weight_map:
                errors.append(
                    f"{shard.where}: holds tensor {name}, which {index.name} places in "
                    f"{weight_map[name]}"
                )
            else:
                errors.append(f"{shard.where}: tensor {name} is not in {index.name}")
        tensors |= shard
    if errors:
        raise WeightsError(*errors)
    return Weights(tensors, str(index.parent))


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    # Read by hand instead of by safetensors.safe_open, which copies every tensor it returns.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise WeightsError(f"{path}: not a safetensors file, or cut short")
        try:
            header = json.loads(file.read(start - 8), object_pairs_hook=list)
            placed = [
                (name, *_placed(dict(info))) for name, info in header if name != "__metadata__"
            ]
        except (ValueError, TypeError, KeyError):
            raise WeightsError(f"{path}: not a safetensors file: broken header") from None
    needed = start + max((end for *_, end in placed), default=0)
    if needed > size:
        raise WeightsError(
            f"{path}: cut short: {size} bytes instead of {needed}; is the download complete?"
        )
    errors, tensors = [], {}
    for name, dtype, shape, begin, end in placed:
        if name in tensors:
            errors.append(f"{path}: tensor {name} is there twice")
        if dtype not in SAFETENSORS_DTYPES:
            errors.append(f"{path}: tensor {name} has the unsupported type {dtype}")
            continue
        kind = np.dtype(SAFETENSORS_DTYPES[dtype])
        if begin < 0 or end - begin != math.prod(shape) * kind.itemsize:
            errors.append(
                f"{path}: tensor {name} has {end - begin} bytes, {dtype} {list(shape)} needs "
                f"{math.prod(shape) * kind.itemsize}"
            )
            continue
        tensors[name] = LazyTensor(shape, kind, _mapped(path, kind, start + begin, shape))
    if errors:
        raise WeightsError(*errors)
    return tensors


def _placed(info: dict[str, Any]) -> tuple[str, Shape, int, int]:
    """Type, shape, first byte and end of a tensor, from its entry in a safetensors header."""
    begin, end = info["data_offsets"]
    return str(info["dtype"]), tuple(int(n) for n in info["shape"]), int(begin), int(end)


def _mapped(path: Path, dtype: np.dtype, offset: int, shape: Shape) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        data = np.memmap(path, np.uint8, "r", offset, math.prod(shape) * dtype.itemsize)
        return data.view(dtype).reshape(shape)

    return load


def _read_torch(path: Path) -> dict[str, LazyTensor]:
    try:
        import torch
    except ModuleNotFoundError:
        raise WeightsError(
            f"{path}: reading a torch file needs torch (pip install torch), or save it as "
            "safetensors"
        ) from None
    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path}: torch cannot load it: {reason}") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path}: holds no state dict")
    strangers = [name for name, x in state.items() if not isinstance(x, torch.Tensor)]
    if strangers:
        raise WeightsError(*[f"{path}: {name} is not a tensor" for name in strangers])

    def load(x: torch.Tensor) -> np.ndarray:
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return x.numpy()

    def dtype(name: str, x: torch.Tensor) -> np.dtype:
        kind = str(x.dtype).removeprefix("torch.")
        try:
            return np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
        except TypeError:
            raise WeightsError(f"{path}: tensor {name} has the unsupported type {kind}") from None

    return {
        name: LazyTensor(tuple(x.shape), dtype(name, x), lambda x=x: load(x))
        for name, x in state.items()
    }
