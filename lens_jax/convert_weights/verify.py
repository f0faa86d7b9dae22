"""A checkpoint of ours against official weights, tensor by tensor."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lens_jax import checkpoints
from lens_jax.convert_weights import lens as lens_weights
from lens_jax.convert_weights.export import Stored, carried_entries, check_stored
from lens_jax.convert_weights.official import Official, open_official
from lens_jax.convert_weights.reader import LazyTensor, open_weights
from lens_jax.convert_weights.table import WeightsError
from lens_jax.convert_weights.tables import lens_table
from lens_jax.convert_weights.values import Dtype, cast, difference
from lens_jax.models.lens import LensConfig

# Of the largest value; float32 itself is good for about a hundredth of it.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """Lines on what was compared, and lines on what differs."""

    compared: tuple[str, ...]
    differences: tuple[str, ...]


def verify(
    checkpoint: Path,
    torch: Path,
    sam: Path | None = None,
    dtype: Dtype = "keep",
    forward: bool = False,
) -> Verification:
    """Compares a checkpoint of lens-jax with official PyTorch weights.

    Every tensor must have the same shape, type and bits; what differs is printed. Ends with 0 if
    all agree, with 1 if something differs, with 2 if something cannot be read.

    With --forward true both models run, too, on a random image, with the weights of their own
    files: ours, and in PyTorch transformers' Qwen-VL and SAM with a plain context module between
    them. Compared are the logits of a random prompt, the token that prompts SAM (the positions of
    the pass with queries are the checkpoint's context_positions, the same on both sides) and the
    mask decoder's low-resolution logits, all of its masks. Float32 on the CPU: the largest
    difference may be 0.001 of the largest value. Takes torch, and 8 bytes of memory a parameter.

    Args:
      checkpoint: a pretrained checkpoint, such as runs/tiny/final.
      torch: an official LENS directory, or what to_torch --layout hf wrote, or with --sam the
        Hugging Face directory of a Qwen-VL alone; the context module is left out then.
      sam: SAM's weights, where that directory has none or, after stage 1, not the true ones.
      dtype: the --dtype the checkpoint was converted with; official values are cast alike.
      forward: run both models, too.

    Raises:
      CheckpointError: no checkpoint there, or a damaged one.
      WeightsError: official files that cannot be read.
    """
    checkpoint, torch = Path(checkpoint), Path(torch)
    config = checkpoints.read_config(checkpoint)
    model = checkpoints.model_shapes(checkpoint, config)
    stored = checkpoints.saved_params(checkpoint)
    check_stored(checkpoint, model, stored)
    official, has_context = _open(torch, sam)
    differences = list(_configs(model, official.shapes))
    theirs = _tensors(official, has_context)
    count = 0
    for line in _compare(checkpoint, model, stored, theirs, dtype, has_context):
        count += 1
        if line:
            differences.append(line)
    compared = [f"{count} tensors"]
    if forward:
        try:
            from lens_jax.convert_weights.forward import run_both
        except ModuleNotFoundError:
            raise WeightsError(
                "--forward true runs the PyTorch model, too, and needs torch: pip install torch"
            ) from None
        for name, gap in run_both(checkpoint, official, theirs).items():
            compared.append(f"{name}: largest difference {gap:.1e} of the largest value")
            if not gap <= TOLERANCE:
                differences.append(f"{name} differ by {gap:.1e} of the largest value")
    return Verification(tuple(compared), tuple(differences))


def _open(directory: Path, sam: Path | None) -> tuple[Official, bool]:
    """Official weights in one of the three forms, and whether a context module is among them."""
    if (directory / "mllm").is_dir():
        context = directory / "context.safetensors"
        return open_official(directory / "mllm", None, sam or directory / "sam", context), True
    has_context = any(name.startswith(lens_weights.PREFIXES) for name in open_weights(directory))
    if has_context:
        return open_official(None, directory, sam), True
    if sam is None:
        raise WeightsError(f"--torch {directory} is a Qwen-VL alone: give its SAM as --sam FILE")
    return open_official(directory, None, sam), False


def _tensors(official: Official, has_context: bool) -> dict[str, LazyTensor]:
    """Name in an official LENS checkpoint -> tensor, known junk left out."""
    return {
        name: tensor
        for part in official.parts
        for name, tensor in part.source.items()
        if (has_context or not name.startswith(lens_weights.PREFIXES))
        and not any(re.fullmatch(pattern, name) for pattern in part.table.junk)
    }


def _configs(ours: LensConfig, theirs: LensConfig) -> Iterator[str]:
    for part in ("mllm", "sam"):
        a, b = vars(getattr(ours, part)), vars(getattr(theirs, part))
        yield from (f"{part}.{k}: {a[k]} here, {b.get(k)} there" for k in a if a[k] != b.get(k))


def _compare(
    checkpoint: Path,
    model: LensConfig,
    stored: Stored,
    theirs: dict[str, LazyTensor],
    dtype: Dtype,
    has_context: bool,
) -> Iterator[str | None]:
    """For every tensor that either side has, what is wrong with it."""
    entries = {e.source: e for e in (*lens_table(model).entries, *carried_entries(stored))}
    if not has_context:
        entries = {n: e for n, e in entries.items() if not n.startswith(lens_weights.PREFIXES)}
    for name in theirs.keys() - entries.keys():
        yield f"{name} is not in {checkpoint}"
    shared = {name: entry for name, entry in entries.items() if name in theirs}
    for name in entries.keys() - shared.keys():
        yield f"{name} is only in {checkpoint}"
    ours = checkpoints.read_params(checkpoint, [entry.target for entry in shared.values()])
    bar = tqdm(shared.items(), desc="compare", unit="tensor", leave=False)
    for (name, entry), (_, x) in zip(bar, ours, strict=True):
        wrong = difference(entry.transform.inverse(x), cast(theirs[name].load(), dtype))
        yield f"{name} {wrong}" if wrong else None
