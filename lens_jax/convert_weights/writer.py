"""Safetensors files as Hugging Face lays them out, written tensor by tensor."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lens_jax.convert_weights.reader import SAFETENSORS_DTYPES
from lens_jax.convert_weights.table import Shape
from lens_jax.convert_weights.values import pieces

_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(
    directory: Path, specs: Sequence[Spec], arrays: Iterable[np.ndarray], shard_bytes: float
) -> None:
    """`model.safetensors`, or with more than `shard_bytes` numbered shards and their index.

    `arrays` yields the tensors in the order of `specs`, and more perhaps: it is not exhausted.
    """
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", specs, arrays)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard, arrays)
        weight_map |= {spec.name: file for spec in shard}
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_safetensors(file: Path, specs: Sequence[Spec], arrays: Iterable[np.ndarray]) -> None:
    """One file: the length of the header, the header in JSON, then all bytes in a row."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for spec, x in zip(specs, arrays, strict=False):
            if (x.shape, x.dtype) != (spec.shape, spec.dtype):
                raise AssertionError(f"{spec} was announced, {x.shape} {x.dtype} came")
            for piece in pieces(x):
                f.write(piece.view(np.uint8).data)
