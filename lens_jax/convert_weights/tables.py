"""The table of a whole LENS, and the parameters that it must fill."""

import functools
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from lens_jax import checkpoints
from lens_jax.convert_weights import lens as lens_weights
from lens_jax.convert_weights import qwen_vl, sam1, sam2
from lens_jax.convert_weights.reader import from_arrays
from lens_jax.convert_weights.table import UNUSED, Entry, Shape, Table, make_plan
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.sam.config import Sam2Config, SamConfig


def lens_table(config: LensConfig) -> Table:
    """Every tensor of an official LENS checkpoint."""
    return (
        qwen_vl.table(config.mllm)
        + lens_weights.context_table(config.connector_depth)
        + sam_family(config.sam).table(config.sam).with_prefix("sam.")
    )


def sam_family(config: SamConfig | Sam2Config) -> ModuleType:
    """The module with the names of this SAM."""
    return sam1 if isinstance(config, SamConfig) else sam2


def hf_sam_entries(
    config: SamConfig | Sam2Config, carried: Iterable[Entry] = ()
) -> dict[str, tuple[Entry, ...]]:
    """Names in Hugging Face's SAM -> the entries of ours that are the rows of that tensor.

    The random matrix of positions is there twice, as Hugging Face has it.
    """
    family = sam_family(config)
    rows: dict[str, dict[int, Entry]] = {}
    for entry in (*family.table(config).entries, *carried):
        name, row = family.hf_source(config, entry.source)
        rows.setdefault(name, {})[row or 0] = entry
    named: dict[str, tuple[Entry, ...]] = {}
    for name, parts in rows.items():
        named[name] = tuple(parts[row] for row in sorted(parts))
        if name == family.HF_MATRIX:
            named[family.HF_MATRIX_AGAIN] = named[name]
    return named


@functools.cache
def parameter_shapes(config: LensConfig) -> dict[str, Shape]:
    """On-disk name -> shape of every parameter of the model, without memory for any."""
    state = nnx.to_pure_dict(nnx.state(abstract(config)))
    empty = jax.tree.map(lambda x: np.broadcast_to(np.uint8(0), x.shape), state)
    return {name: x.shape for name, x in checkpoints.unstack(empty)}


def load_lens_state(
    tensors: Mapping[str, np.ndarray], config: LensConfig, dtype: Any = np.float32
) -> dict[Any, Any]:
    """Official tensors in memory as the nested pure-dict state of `LensModel(config)`.

    `nnx.update(model, state)` takes it. Tensors that the model never uses are left out.

    Args:
      tensors: official LENS names -> arrays, in PyTorch's layouts.
      config: the shapes.
      dtype: of all floating-point parameters.

    Raises:
      WeightsError: missing, unexpected and misshapen tensors.
    """
    source = from_arrays(tensors).rename(qwen_vl.official_name)
    if config.mllm.tie_word_embeddings:
        source = qwen_vl.without_tied_head(source)
    plan = make_plan(lens_table(config), source.shapes, parameter_shapes(config), source.where)
    return checkpoints.stack(
        {
            entry.target: entry.transform.forward(source[entry.source].load()).astype(dtype)
            for entry in plan.entries
            if not entry.target.startswith(UNUSED)
        }
    )
