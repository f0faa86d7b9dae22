"""From official weight files to a pretrained checkpoint of ours, tensor by tensor."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lens_jax import checkpoints
from lens_jax.convert_weights import release_files
from lens_jax.convert_weights.official import Official, open_official
from lens_jax.convert_weights.reader import TabledWeights, Weights
from lens_jax.convert_weights.table import UNUSED, Entry, Plan, Shape, WeightsError, make_plan
from lens_jax.convert_weights.tables import parameter_shapes
from lens_jax.convert_weights.values import Dtype, cast, is_finite, is_floating
from lens_jax.flags import NonNegativeInt, PositiveInt

log = logging.getLogger("lens_jax")


@dataclass(frozen=True)
class Conversion:
    """Numbers of converted tensors, and the names of those that were left out."""

    tensors: int
    unused: int
    dropped: tuple[str, ...]


def from_torch(
    output: Path,
    mllm: Path | None = None,
    lens: Path | None = None,
    sam: Path | None = None,
    context: Path | None = None,
    dtype: Dtype = "keep",
    num_queries: PositiveInt = 64,
    seed: NonNegativeInt = 0,
) -> Conversion:
    """Official weights to a pretrained checkpoint of lens-jax.

    A new LENS from its two parents, to be trained:
      python -m tools.convert_weights from_torch --mllm Qwen2.5-VL-3B-Instruct
      --sam sam2_hiera_large.pt --output checkpoints/start

    An official LENS checkpoint; after stage 1 the true SAM must be named:
      python -m tools.convert_weights from_torch --lens LENS-3B --output checkpoints/lens-3b
      python -m tools.convert_weights from_torch --lens LENS-3B-stage1 --sam sam2_hiera_large.pt
      --output checkpoints/stage1

    What `to_torch --layout hf` wrote:
      python -m tools.convert_weights from_torch --mllm hf/mllm --sam hf/sam
      --context hf/context.safetensors --output checkpoints/again

    Args:
      output: the directory to write; it must not hold anything yet.
      mllm: Hugging Face directory of Qwen2-VL or Qwen2.5-VL; the context module is drawn fresh.
      lens: official LENS directory, sharded or not.
      sam: SAM 2 or SAM 1 weights (.pt, .pth, .safetensors, or a directory with one), under their
        original names or Hugging Face's. Shapes come from sam2_config.json or sam_config.json
        beside it, or Hugging Face's config.json, otherwise the published model is recognised.
      context: with mllm, the context module under its official names instead of a fresh one.
      dtype: how floating-point tensors are stored; keep changes no bit.
      num_queries: context queries of a fresh context module.
      seed: of a fresh context module.

    Raises:
      WeightsError: all missing, unexpected and misshapen tensors by name; nothing is written.
    """
    if num_queries < 1:
        raise WeightsError(
            f"--num_queries: expected a whole number of at least 1, got {num_queries}"
        )
    official = open_official(mllm, lens, sam, context, num_queries, seed)
    for file in release_files.missing(Path(mllm or lens)):
        log.warning(
            "%s is missing: before %s can be used, copy it there from the model's release",
            file,
            output,
        )
    plans = _checked(Path(mllm or lens), official)
    checkpoints.save_pretrained(
        output,
        _tensors(official.parts, plans, dtype),
        official.config,
        files_from=mllm or lens,
    )
    entries = [entry for plan in plans for entry in plan.entries]
    unused = sum(entry.target.startswith(UNUSED) for entry in entries)
    dropped = official.left_out + tuple(name for plan in plans for name in plan.junk)
    return Conversion(len(entries) - unused, unused, dropped)


def check_torch(mllm: Path, sam: Path, num_queries: int, seed: int) -> dict[str, Any]:
    """The lens_config.json that `from_torch` would write, if it would; itself it writes nothing."""
    official = open_official(mllm, None, sam, None, num_queries, seed)
    _checked(mllm, official)
    return official.config


def _checked(directory: Path, official: Official) -> list[Plan]:
    """The plans that account for every tensor. Raises WeightsError and CheckpointError."""
    release_files.check(directory, official.config)
    return _plan(official.parts, parameter_shapes(official.shapes))


def _plan(parts: list[TabledWeights], expected: Mapping[str, Shape]) -> list[Plan]:
    plans, errors = [], []
    for part in parts:
        targets = {entry.target for entry in part.table.entries}
        shapes = {name: shape for name, shape in expected.items() if name in targets}
        try:
            plans.append(make_plan(part.table, part.source.shapes, shapes, part.source.where))
        except WeightsError as error:
            errors += error.errors
    if errors:
        raise WeightsError(*errors)
    for part, plan in zip(parts, plans, strict=True):
        errors += [
            f"{part.source.where}: tensor {entry.source} is of type {dtype}, which no weight is"
            for entry in plan.entries
            if not is_floating(dtype := part.source[entry.source].dtype)
        ]
    if errors:
        raise WeightsError(*errors)
    return plans


def _tensors(
    parts: list[TabledWeights], plans: list[Plan], dtype: Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """On-disk names with their tensors, each loaded only when it is asked for."""
    jobs: list[tuple[Weights, Entry]] = [
        (part.source, entry)
        for part, plan in zip(parts, plans, strict=True)
        for entry in plan.entries
    ]
    for source, entry in tqdm(jobs, desc="convert", unit="tensor", leave=False):
        tensor = source[entry.source].load()
        if not is_finite(tensor):
            raise WeightsError(
                f"{source.where}: tensor {entry.source} holds NaN or infinite values"
            )
        yield entry.target, cast(entry.transform.forward(tensor), dtype)
