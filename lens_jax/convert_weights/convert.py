"""From official weight files to a pretrained checkpoint of ours, tensor by tensor."""

import contextlib
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from lens_jax import checkpoints
from lens_jax.convert_weights import contradictions, qwen_vl, sam1, sam2, strangers
from lens_jax.convert_weights import lens as lens_weights
from lens_jax.convert_weights.reader import LazyTensor, Source, from_arrays, open_weights, read_json
from lens_jax.convert_weights.sam_parts import check_pictures
from lens_jax.convert_weights.table import (
    UNUSED,
    Entry,
    Plan,
    Shape,
    Table,
    WeightsError,
    make_plan,
)
from lens_jax.convert_weights.values import Dtype, cast, difference, is_finite, is_floating
from lens_jax.data import processor_files, prompts
from lens_jax.files import blaming
from lens_jax.flags import NonNegativeInt, PositiveInt
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.sam.config import Sam2Config, SamConfig

T = TypeVar("T")

log = logging.getLogger("lens_jax")


@dataclass(frozen=True)
class Conversion:
    """What was converted: numbers of tensors, and the names of those that were left out."""

    tensors: int
    unused: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A source with the table that must account for all of it."""

    source: Source
    table: Table


@dataclass(frozen=True)
class Official:
    """Official weights as found: what lens_config.json will say, and where the tensors are.

    `left_out` names tensors that another file replaces.
    """

    config: dict[str, Any]
    parts: list[Part]
    left_out: tuple[str, ...]


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
            [f"--num_queries: expected a whole number of at least 1, got {num_queries}"]
        )
    official = open_official(mllm, lens, sam, context, num_queries, seed)
    for file in _missing_files(Path(mllm or lens)):
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
    _check_files(directory, official.config)
    model = shapes_from(directory, lambda: LensConfig.from_dict(official.config))
    return _plan(official.parts, parameter_shapes(model))


def _check_files(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what loading the checkpoint would refuse in the files beside the
    weights, and WeightsError where they contradict each other.

    Of those that are not there, `_missing_files` speaks.
    """
    with blaming(directory / "config.json"):
        processor_files.check_patches(config["mllm"].get("vision_config") or {})
        shapes = QwenVLConfig.from_hf(config["mllm"])
    if processor_files.has_images(directory):
        processor_files.read_images(directory)
    if (directory / processor_files.GENERATION).is_file():
        processor_files.read_generation(directory, shapes.vocab_size)
    if processor_files.has_tokenizer(directory):
        tokenizer, file = processor_files.read_tokenizer(directory)
        with blaming(directory / checkpoints.CONFIG):
            templates = prompts.Templates.from_dict(config.get("prompts", {}))
        with blaming(file):
            encoder = prompts.PromptEncoder(tokenizer, templates)
        asked, found = shapes.image_token_id, encoder.image_token_id
        if asked != found:
            levels = (config["mllm"], config["mllm"].get("text_config") or {})
            is_given = any(level.get("image_token_id") is not None for level in levels)
            default = "" if is_given else " where the file does not say"
            raise WeightsError(
                [
                    f"{directory / 'config.json'}: image_token_id is {asked}{default}, but the "
                    f"tokenizer's {prompts.IMAGE_TOKEN} is {found}"
                ]
            )
        tokens = tokenizer.get_vocab() | _added_tokens(directory)
        token, last = max(tokens.items(), key=lambda item: item[1])
        if last >= shapes.vocab_size:
            raise WeightsError(
                [
                    f"{directory / processor_files.TOKENIZER}: the token {token!r} is number "
                    f"{last}, but vocab_size in config.json is {shapes.vocab_size}: one of them is "
                    "another model's"
                ]
            )


def _added_tokens(directory: Path) -> dict[str, int]:
    """Tokens that tokenizer.json adds, those included that transformers leaves out on loading."""
    file = directory / processor_files.TOKENIZER
    added = processor_files.read_json(file).get("added_tokens") if file.is_file() else None
    return {str(token["content"]): token["id"] for token in added or ()}


def _missing_files(directory: Path) -> list[Path]:
    """Files that a checkpoint cannot be used without, and that are not there to be copied."""
    names = [
        processor_files.TOKENIZER if not processor_files.has_tokenizer(directory) else None,
        processor_files.GENERATION
        if not (directory / processor_files.GENERATION).is_file()
        else None,
        processor_files.PREPROCESSOR if not processor_files.has_images(directory) else None,
    ]
    return [directory / name for name in names if name is not None]


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


def open_official(
    mllm: Path | None,
    lens: Path | None,
    sam: Path | None,
    context: Path | None = None,
    num_queries: int = LensConfig.num_queries,
    seed: int = 0,
) -> Official:
    """Official weights in any of the layouts that `from_torch` describes, nothing read yet.

    Without a file for it, the context module's part comes from a draw of (num_queries, seed).

    Raises:
      WeightsError: arguments that do not go together, a file that cannot be read, another model.
    """
    if (mllm is None) == (lens is None):
        raise WeightsError(["give either --mllm DIR together with --sam FILE, or --lens DIR"])
    if mllm is not None and sam is None:
        raise WeightsError(["--mllm needs --sam FILE: a new LENS has two parents"])
    if context is not None and lens is not None:
        raise WeightsError(["--context goes with --mllm: an official LENS has its own"])
    directory = Path(mllm or lens)
    strangers.check_directory(directory)
    hf_config = read_json(directory / "config.json")
    shapes_from(directory / "config.json", lambda: QwenVLConfig.from_hf(hf_config))
    source = open_weights(directory)
    strangers.check_names(source)
    source = source.rename(qwen_vl.official_name)
    hf_config = qwen_vl.settle_tie(hf_config, source)
    shapes = shapes_from(directory / "config.json", lambda: QwenVLConfig.from_hf(hf_config))
    left_out: tuple[str, ...] = ()
    if shapes.tie_word_embeddings and "lm_head.weight" in source:
        source = qwen_vl.without_tied_head(source)
        left_out = ("lm_head.weight",)
    _check_kind(source, lens is not None)
    contradictions.check_mllm(directory / "config.json", shapes, source.shapes)

    own_sam = source.select(lambda name: name.startswith("sam."))
    source = source.select(lambda name: not name.startswith("sam."))
    if sam is not None:
        sam_config, sam_part = _open_sam(Path(sam))
        left_out += tuple(own_sam)
    elif own_sam:
        lens_weights.check_trained_sam(own_sam)
        sam_config = _sam_config(own_sam.rename(lambda name: name.removeprefix("sam.")), directory)
        sam_part = Part(own_sam, sam_family(sam_config).table(sam_config).with_prefix("sam."))
    else:
        raise WeightsError([f"{directory}: holds no sam.*; name SAM's weights with --sam FILE"])

    trained = source if lens is not None else None
    saved = directory / checkpoints.CONFIG
    if context is not None:
        trained = open_weights(Path(context))
        strangers.check_names(trained)
        saved = Path(context).parent / checkpoints.CONFIG
    config = {
        "mllm": hf_config,
        "sam": sam_config.to_dict(),
        "num_queries": num_queries if trained is None else _num_queries(trained),
        "connector_depth": LensConfig.connector_depth if trained is None else _depth(trained),
        "connector_heads": LensConfig.connector_heads,
        # Released LENS weights were trained on plain positions in every pass with queries.
        "context_positions": "mrope" if trained is None else "text",
        "coordinates": "qwen2vl" if shapes.vision.family == "qwen2_vl" else "qwen2p5vl",
        "prompts": {
            "system": prompts.SYSTEM,
            "question": prompts.QUESTION,
            "reasoning_question": prompts.REASONING_QUESTION,
        },
    }
    if trained is not None and saved.exists():  # `to_torch` puts it beside what it writes
        config = read_json(saved) | {key: config[key] for key in _FROM_TENSORS}
    table = lens_weights.context_table(config["connector_depth"])
    mllm_table = qwen_vl.table(shapes)
    if lens is not None:
        return Official(config, [Part(source, mllm_table + table), sam_part], left_out)
    if trained is None:
        expected = parameter_shapes(shapes_from(directory, lambda: LensConfig.from_dict(config)))
        trained = lens_weights.fresh_context(table, expected, seed)
    return Official(config, [Part(source, mllm_table), Part(trained, table), sam_part], left_out)


# Keys of lens_config.json that the weights and their own configuration files decide.
_FROM_TENSORS = ("mllm", "sam", "num_queries", "connector_depth")


def _check_kind(source: Source, is_lens: bool) -> None:
    has_context = any(name.startswith(lens_weights.PREFIXES) for name in source)
    if has_context and not is_lens:
        raise WeightsError([f"{source.where}: is a LENS checkpoint; convert it with --lens"])
    if is_lens and not has_context:
        raise WeightsError(
            [
                f"{source.where}: is no LENS checkpoint: learnable_query and connector.* are "
                "missing; a plain Qwen-VL is converted with --mllm and --sam"
            ]
        )


def _num_queries(source: Source) -> int:
    queries = source.get("learnable_query")
    if queries is None or len(queries.shape) != 3:
        found = "missing" if queries is None else f"of shape {list(queries.shape)}"
        raise WeightsError([f"{source.where}: learnable_query is {found}, expected [1, M, D]"])
    return queries.shape[1]


def _depth(source: Source) -> int:
    """Blocks of the connector."""
    block = re.compile(r"connector\.blocks\.(\d+)\.")
    return len({match[1] for name in source if (match := block.match(name))})


def _open_sam(path: Path) -> tuple[SamConfig | Sam2Config, Part]:
    """SAM's configuration, and its tensors under the names `sam.` + original."""
    if path.is_dir():
        strangers.check_directory(path)
    source = open_weights(path)
    strangers.check_names(source)
    is_hugging_face = _has_hugging_face_names(source)
    config = _sam_config(source, path if path.is_dir() else path.parent)
    family = sam_family(config)
    table = family.table(config)
    if is_hugging_face:
        check_pictures(path if path.is_dir() else path.parent)
        source = _original_names(source, config, table)
        table = replace(table, junk=family.HF_JUNK)
    return config, Part(source.rename(lambda name: f"sam.{name}"), table.with_prefix("sam."))


def _has_hugging_face_names(source: Source) -> bool:
    return any(name.startswith("vision_encoder.") for name in source)


def _original_names(source: Source, config: SamConfig | Sam2Config, table: Table) -> Source:
    """Hugging Face's SAM under the original names, rows of stacked tensors taken apart."""
    family = sam_family(config)
    tensors = dict(source)
    again = tensors.pop(family.HF_MATRIX_AGAIN, None)
    if again is not None:
        matrix = tensors.setdefault(family.HF_MATRIX, again)
        if difference(matrix.load(), again.load()):
            raise WeightsError(
                [f"{source.where}: {family.HF_MATRIX_AGAIN} differs from {family.HF_MATRIX}"]
            )
    source, renamed = Source(tensors, source.where), {}
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
    return Source(tensors | renamed, source.where)


def _sam_config(source: Source, directory: Path) -> SamConfig | Sam2Config:
    """By the file beside the weights, or by their shapes; original or Hugging Face's names.

    Hugging Face's config.json goes before shapes where the names are Hugging Face's: it says what
    leaves no trace in them. Beside original names it is asked last, for it may be another file's.
    """
    is_sam1 = any(re.match(sam1.OWN_NAMES, name) for name in source)
    kind, family = (SamConfig, sam1) if is_sam1 else (Sam2Config, sam2)
    shapes = source.rename(family.original_encoder_name).shapes
    own, beside = directory / family.CONFIG_FILE, directory / "config.json"
    hf = read_json(beside) if beside.exists() else {}
    is_sam = str(hf.get("model_type", "")).startswith("sam")
    found = {}
    if own.exists():
        found[own] = shapes_from(own, lambda: kind.from_dict(read_json(own), str(own)))
    elif not _has_hugging_face_names(source):
        with contextlib.suppress(ValueError):
            return kind.from_shapes(shapes, source.where)
    if is_sam and (_has_hugging_face_names(source) or not found):
        found[beside] = shapes_from(beside, lambda: family.config_from_hf(hf, str(beside)))
    for file, config in found.items():
        contradictions.check_sam(file, config, shapes)
    if len({str(family.hf_config(config)) for config in found.values()}) > 1:
        raise WeightsError([f"{beside}: contradicts {own.name} beside it; remove one of them"])
    if found:
        return next(iter(found.values()))
    return shapes_from(directory, lambda: kind.from_shapes(shapes, source.where))


def shapes_from(where: Path, read: Callable[[], T]) -> T:
    """What `read` returns; its complaints as a WeightsError that names the file."""
    try:
        return read()
    except KeyError as error:
        raise WeightsError([f"{where}: the key {error} is missing"]) from None
    except (AttributeError, TypeError, ValueError) as error:
        message = str(error)
        raise WeightsError([message if str(where) in message else f"{where}: {message}"]) from None


def _plan(parts: list[Part], expected: Mapping[str, Shape]) -> list[Plan]:
    plans, errors = [], []
    for part in parts:
        targets = {entry.target for entry in part.table.entries}
        shapes = {name: shape for name, shape in expected.items() if name in targets}
        try:
            plans.append(make_plan(part.table, part.source.shapes, shapes, part.source.where))
        except WeightsError as error:
            errors += error.errors
    if errors:
        raise WeightsError(errors)
    for part, plan in zip(parts, plans, strict=True):
        errors += [
            f"{part.source.where}: tensor {entry.source} is of type {dtype}, which no weight is"
            for entry in plan.entries
            if not is_floating(dtype := part.source[entry.source].dtype)
        ]
    if errors:
        raise WeightsError(errors)
    return plans


def _tensors(
    parts: list[Part], plans: list[Plan], dtype: Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """On-disk names with their tensors, each loaded only when it is asked for."""
    jobs: list[tuple[Source, Entry]] = [
        (part.source, entry)
        for part, plan in zip(parts, plans, strict=True)
        for entry in plan.entries
    ]
    for source, entry in tqdm(jobs, desc="convert", unit="tensor", leave=False):
        tensor = source[entry.source].load()
        if not is_finite(tensor):
            raise WeightsError(
                [f"{source.where}: tensor {entry.source} holds NaN or infinite values"]
            )
        yield entry.target, cast(entry.transform.forward(tensor), dtype)
