"""SAM's weights and shapes, from files in Meta's form or in Hugging Face's."""

import contextlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lens_jax.convert_weights import contradictions, sam1, sam2, strangers
from lens_jax.convert_weights.reader import LazyTensor, TabledWeights, Weights, open_weights
from lens_jax.convert_weights.sam_parts import check_pictures
from lens_jax.convert_weights.table import Table, WeightsError
from lens_jax.convert_weights.tables import sam_family
from lens_jax.convert_weights.values import difference
from lens_jax.files import blaming, read_json
from lens_jax.models.sam.config import Sam2Config, SamConfig


def open_sam(path: Path) -> tuple[SamConfig | Sam2Config, TabledWeights]:
    """SAM's configuration, and its tensors under the names `sam.` + original."""
    if path.is_dir():
        strangers.check_directory(path)
    source = open_weights(path)
    strangers.check_names(source)
    is_hugging_face = _has_hugging_face_names(source)
    config = read_sam_config(source, path if path.is_dir() else path.parent)
    family = sam_family(config)
    table = family.table(config)
    if is_hugging_face:
        check_pictures(path if path.is_dir() else path.parent)
        source = _original_names(source, config, table)
        table = replace(table, junk=family.HF_JUNK)
    return config, TabledWeights(
        source.rename(lambda name: f"sam.{name}"), table.with_prefix("sam.")
    )


def _has_hugging_face_names(source: Weights) -> bool:
    return any(name.startswith("vision_encoder.") for name in source)


def _original_names(source: Weights, config: SamConfig | Sam2Config, table: Table) -> Weights:
    """Hugging Face's SAM under the original names, rows of stacked tensors taken apart."""
    family = sam_family(config)
    tensors = dict(source)
    again = tensors.pop(family.HF_MATRIX_AGAIN, None)
    if again is not None:
        matrix = tensors.setdefault(family.HF_MATRIX, again)
        if difference(matrix.load(), again.load()):
            raise WeightsError(
                f"{source.where}: {family.HF_MATRIX_AGAIN} differs from {family.HF_MATRIX}"
            )
    source, renamed = Weights(tensors, source.where), {}
    originals = [*(entry.source for entry in table.entries), *family.CARRIED_NAMES]
    places = {original: family.hf_source(config, original) for original in originals}
    stacked = Counter(name for name, row in places.values() if row is not None)
    for original, (name, row) in places.items():
        tensor = source.get(name)
        # With too many rows or too few it stays as it is: unexpected, and the originals missing.
        if tensor is None or (row is not None and tensor.shape[:1] != (stacked[name],)):
            continue
        tensors.pop(name, None)
        if row is not None:
            tensor = LazyTensor(
                (1, *tensor.shape[1:]),
                tensor.dtype,
                lambda load=tensor.load, row=row: load()[row : row + 1],
            )
        renamed[original] = tensor
    return Weights(tensors | renamed, source.where)


def read_sam_config(source: Weights, directory: Path) -> SamConfig | Sam2Config:
    """By the file beside the weights, or by their shapes; original or Hugging Face's names.

    Hugging Face's config.json goes before shapes where the names are Hugging Face's: it says what
    leaves no trace in them. Beside original names it is asked last, for it may be another file's.
    """
    is_sam1 = any(re.match(sam1.OWN_NAMES, name) for name in source)
    family = sam1 if is_sam1 else sam2
    shapes = source.rename(family.original_encoder_name).shapes
    own, beside = directory / family.CONFIG_FILE, directory / "config.json"
    hf = read_json(beside) if beside.exists() else {}
    is_sam = str(hf.get("model_type", "")).startswith("sam")
    found = {}
    if own.exists():
        with blaming(own):
            found[own] = family.read_config(read_json(own))
    elif not _has_hugging_face_names(source):
        with contextlib.suppress(WeightsError):
            return family.recognise(shapes, source.where)
    if is_sam and (_has_hugging_face_names(source) or not found):
        with blaming(beside):
            found[beside] = family.read_hf(hf)
    for file, config in found.items():
        contradictions.check_sam(file, config, shapes)
    if len({str(family.write_hf(config)) for config in found.values()}) > 1:
        raise WeightsError(f"{beside}: contradicts {own.name} beside it; remove one of them")
    if found:
        return next(iter(found.values()))
    return family.recognise(shapes, source.where)
