"""Official weights in any of their layouts, opened but not read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens_jax import checkpoints
from lens_jax.convert_weights import contradictions, qwen_vl, strangers
from lens_jax.convert_weights import lens as lens_weights
from lens_jax.convert_weights.reader import TabledWeights, Weights, open_weights
from lens_jax.convert_weights.sam_files import open_sam, read_sam_config
from lens_jax.convert_weights.table import WeightsError
from lens_jax.convert_weights.tables import parameter_shapes, sam_family
from lens_jax.data import prompts
from lens_jax.files import blaming, read_json
from lens_jax.model_configs.lens import read_lens
from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.model_configs.sam import write_sam
from lens_jax.models.lens import LensConfig


@dataclass(frozen=True)
class Official:
    """Official weights as found: what lens_config.json will say, and where the tensors are.

    `shapes` are those that `config` says; `left_out` names tensors that another file replaces.
    """

    config: dict[str, Any]
    shapes: LensConfig
    parts: list[TabledWeights]
    left_out: tuple[str, ...]


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
        raise WeightsError("give either --mllm DIR together with --sam FILE, or --lens DIR")
    if mllm is not None and sam is None:
        raise WeightsError("--mllm needs --sam FILE: a new LENS has two parents")
    if context is not None and lens is not None:
        raise WeightsError("--context goes with --mllm: an official LENS has its own")
    directory = Path(mllm or lens)
    strangers.check_directory(directory)
    hf_config = read_json(directory / "config.json")
    with blaming(directory / "config.json"):
        read_qwen_vl(hf_config)
    source = open_weights(directory)
    strangers.check_names(source)
    source = source.rename(qwen_vl.official_name)
    with blaming(directory / "config.json"):
        hf_config = qwen_vl.settle_tie(hf_config, source)
        shapes = read_qwen_vl(hf_config)
    left_out: tuple[str, ...] = ()
    if shapes.tie_word_embeddings and "lm_head.weight" in source:
        source = qwen_vl.without_tied_head(source)
        left_out = ("lm_head.weight",)
    _check_kind(source, lens is not None)
    contradictions.check_mllm(directory / "config.json", shapes, source.shapes)

    own_sam = source.select(lambda name: name.startswith("sam."))
    source = source.select(lambda name: not name.startswith("sam."))
    if sam is not None:
        sam_config, sam_part = open_sam(Path(sam))
        left_out += tuple(own_sam)
    elif own_sam:
        lens_weights.check_trained_sam(own_sam)
        bare = own_sam.rename(lambda name: name.removeprefix("sam."))
        sam_config = read_sam_config(bare, directory)
        sam_part = TabledWeights(
            own_sam, sam_family(sam_config).table(sam_config).with_prefix("sam.")
        )
    else:
        raise WeightsError(f"{directory}: holds no sam.*; name SAM's weights with --sam FILE")

    trained = source if lens is not None else None
    saved = directory / checkpoints.CONFIG
    if context is not None:
        trained = open_weights(Path(context))
        strangers.check_names(trained)
        saved = Path(context).parent / checkpoints.CONFIG
    config = {
        "mllm": hf_config,
        "sam": write_sam(sam_config),
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
    with blaming(directory):
        model = read_lens(config)
    if lens is not None:
        parts = [TabledWeights(source, mllm_table + table), sam_part]
    else:
        if trained is None:
            trained = lens_weights.fresh_context(table, parameter_shapes(model), seed)
        parts = [TabledWeights(source, mllm_table), TabledWeights(trained, table), sam_part]
    return Official(config, model, parts, left_out)


# Keys of lens_config.json that the weights and their own configuration files decide.
_FROM_TENSORS = ("mllm", "sam", "num_queries", "connector_depth")


def _check_kind(source: Weights, is_lens: bool) -> None:
    has_context = any(name.startswith(lens_weights.PREFIXES) for name in source)
    if has_context and not is_lens:
        raise WeightsError(f"{source.where}: is a LENS checkpoint; convert it with --lens")
    if is_lens and not has_context:
        raise WeightsError(
            f"{source.where}: is no LENS checkpoint: learnable_query and connector.* are "
            "missing; a plain Qwen-VL is converted with --mllm and --sam"
        )


def _num_queries(source: Weights) -> int:
    queries = source.get("learnable_query")
    if queries is None or len(queries.shape) != 3:
        found = "missing" if queries is None else f"of shape {list(queries.shape)}"
        raise WeightsError(f"{source.where}: learnable_query is {found}, expected [1, M, D]")
    return queries.shape[1]


def _depth(source: Weights) -> int:
    """Blocks of the connector."""
    block = re.compile(r"connector\.blocks\.(\d+)\.")
    return len({match[1] for name in source if (match := block.match(name))})
