"""From a pretrained checkpoint of ours back to PyTorch's layouts, tensor by tensor."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from lens_jax import checkpoints
from lens_jax.convert_weights import configs, qwen_vl
from lens_jax.convert_weights import lens as lens_weights
from lens_jax.convert_weights.table import UNUSED, Entry, WeightsError, carried_entry
from lens_jax.convert_weights.tables import hf_sam_entries, lens_table, parameter_shapes, sam_family
from lens_jax.convert_weights.values import is_finite
from lens_jax.convert_weights.writer import Spec, write_model, write_safetensors
from lens_jax.data.prompts import Templates
from lens_jax.files import blaming
from lens_jax.flags import PositiveFloat
from lens_jax.models.lens import LensConfig
from lens_jax.models.sam.config import PRESETS

Layout = Literal["lens", "hf"]
Stored = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Export:
    """The number of tensors written, and notes for those who use the files."""

    tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written, and those of ours it is made of, one below the other."""

    spec: Spec
    rows: tuple[Entry, ...]


@dataclass(frozen=True)
class _Folder:
    """A folder to be written: tensors, in `file` or as a Hugging Face model, and JSON files."""

    name: str
    tensors: list[_Tensor]
    json_files: Mapping[str, Mapping[str, Any]]
    has_processor: bool = False
    file: str | None = None


def to_torch(
    checkpoint: Path, layout: Layout, output: Path, shard_gb: PositiveFloat = 5.0
) -> Export:
    """Checkpoints of lens-jax to official PyTorch weights.

    lens: a directory as the official LENS code saves and loads it, with the same keys, config.json,
    tokenizer and processor. hf: OUTPUT/mllm and OUTPUT/sam, which transformers loads with
    from_pretrained, and OUTPUT/context.safetensors, the context module under its official names.

    No bit changes, whatever the types are. SAM's shapes are written as sam2_config.json (SAM 1:
    sam_config.json) too, and lens_config.json goes along, so that from_torch finds positions and
    prompts again.

    Args:
      checkpoint: a pretrained checkpoint, such as runs/tiny/final.
      layout: whose files to write.
      output: the directory to write; it must not hold anything yet.
      shard_gb: weights beyond so many gigabytes (10^9 bytes) are split into numbered files.

    Raises:
      CheckpointError: no checkpoint there, or a damaged one.
      WeightsError: tensors that do not fit the configuration; nothing is written.
    """
    config = checkpoints.read_config(checkpoint)
    model = checkpoints.model_shapes(checkpoint, config)
    with blaming(Path(checkpoint) / checkpoints.CONFIG):
        Templates.from_dict(config.get("prompts", {}))
    stored = checkpoints.saved_params(checkpoint)
    check_stored(Path(checkpoint), model, stored)
    folders = (_lens_folders if layout == "lens" else _hf_folders)(config, model, stored)
    tensors = [tensor for folder in folders for tensor in folder.tensors]
    with checkpoints.new_directory(output) as unfinished:
        arrays = _arrays(checkpoint, tensors)
        for folder in folders:
            directory = unfinished / folder.name
            directory.mkdir(exist_ok=True)
            specs = [tensor.spec for tensor in folder.tensors]
            if folder.file:
                write_safetensors(directory / folder.file, specs, arrays)
            else:
                write_model(directory, specs, arrays, shard_gb * 1e9)
            if folder.has_processor:
                checkpoints.copy_processor_files(checkpoint, directory)
            for name, content in folder.json_files.items():
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (directory / name).write_text(text, encoding="utf-8")
    return Export(len(tensors), _notes(model, layout))


def check_stored(checkpoint: Path, model: LensConfig, stored: Stored) -> None:
    """Raises WeightsError when a checkpoint's tensors are not those of its configuration."""
    expected = parameter_shapes(model)
    used = {name for name in stored if not name.startswith(UNUSED)}
    errors = [f"{checkpoint}: missing tensor {name}" for name in sorted(expected.keys() - used)]
    errors += [f"{checkpoint}: unexpected tensor {name}" for name in sorted(used - expected.keys())]
    errors += [
        f"{checkpoint}: misshapen tensor {name}: shape {list(stored[name].shape)}, "
        f"{checkpoints.CONFIG} asks for {list(shape)}"
        for name, shape in expected.items()
        if name in used and stored[name].shape != shape
    ]
    if errors:
        raise WeightsError(*errors)


def carried_entries(stored: Stored) -> list[Entry]:
    """Official tensors that the model never uses."""
    return [
        carried_entry(name.removeprefix(UNUSED).replace("/", "."))
        for name in stored
        if name.startswith(UNUSED)
    ]


def _lens_folders(config: Mapping[str, Any], model: LensConfig, stored: Stored) -> list[_Folder]:
    entries = [*lens_table(model).entries, *carried_entries(stored)]
    json_files = {
        sam_family(model.sam).CONFIG_FILE: config["sam"],
        checkpoints.CONFIG: config,
        # Last: without it, nobody takes the directory for a model.
        "config.json": configs.lens_config(config, _dtype(stored)),
    }
    return [_Folder("", _renamed(entries, stored), json_files, has_processor=True)]


def _hf_folders(config: Mapping[str, Any], model: LensConfig, stored: Stored) -> list[_Folder]:
    context = lens_weights.context_table(model.connector_depth).entries
    mllm_json = {"config.json": configs.mllm_config(config, _dtype(stored))}
    family = sam_family(model.sam)
    sam_json = {family.CONFIG_FILE: config["sam"], "config.json": family.write_hf(model.sam)}
    prefix = UNUSED + "sam/"
    carried = [
        Entry(entry.source.removeprefix("sam."), entry.target)
        for entry in carried_entries(stored)
        if entry.target.startswith(prefix)
    ]
    sam = [
        _tensor(name, entries, stored)
        for name, entries in hf_sam_entries(model.sam, carried).items()
    ]
    mllm = _renamed(qwen_vl.table(model.mllm).entries, stored)
    return [
        _Folder("mllm", mllm, mllm_json, has_processor=True),
        _Folder("sam", sam, sam_json),
        _Folder(
            "", _renamed(context, stored), {checkpoints.CONFIG: config}, file="context.safetensors"
        ),
    ]


def _renamed(entries: Sequence[Entry], stored: Stored) -> list[_Tensor]:
    return [_tensor(entry.source, (entry,), stored) for entry in entries]


def _tensor(name: str, rows: tuple[Entry, ...], stored: Stored) -> _Tensor:
    first = rows[0]
    shape = first.transform.source_shape(stored[first.target].shape)
    if len(rows) > 1:
        shape = (len(rows) * shape[0], *shape[1:])
    return _Tensor(Spec(name, shape, np.dtype(stored[first.target].dtype)), rows)


def _arrays(checkpoint: Path, tensors: Sequence[_Tensor]) -> Iterator[np.ndarray]:
    """The tensors in PyTorch's layout, in this order, each read only when its turn comes."""
    bar = tqdm(total=len(tensors), desc="convert", unit="tensor", leave=False)
    groups = [(rows, list(group)) for rows, group in itertools.groupby(tensors, lambda t: t.rows)]
    ours = checkpoints.read_params(checkpoint, [e.target for rows, _ in groups for e in rows])
    for rows, group in groups:
        parts = []
        for entry in rows:
            name, x = next(ours)
            if not is_finite(x):
                raise WeightsError(f"{checkpoint}: tensor {name} holds NaN or infinite values")
            parts.append(entry.transform.inverse(x))
        x = np.concatenate(parts) if len(parts) > 1 else parts[0]
        for _ in group:
            bar.update()
            yield x
    bar.close()


def _dtype(stored: Stored) -> np.dtype:
    return np.dtype(stored["language/embed_tokens/embedding"].dtype)


def _notes(model: LensConfig, layout: Layout) -> tuple[str, ...]:
    notes = []
    if layout == "lens" and model.context_positions == "mrope":
        notes.append(
            "context_positions is mrope here; the official code gives passes with queries "
            "plain positions, so that its masks will differ"
        )
    if layout == "lens" and (model.connector_depth, model.connector_heads) != (4, 16):
        notes.append(
            f"the connector has {model.connector_depth} blocks of {model.connector_heads} heads, "
            "the official code builds 4 of 16"
        )
    if layout == "lens" and model.sam != PRESETS["large"]:
        notes.append("this SAM is not the one that the official code builds, SAM 2 large")
    return tuple(notes)
