"""Weights that are no model's own: adapters, wrapped and quantised models; said in one line."""

import re
from pathlib import Path

from lens_jax.convert_weights.reader import Weights
from lens_jax.convert_weights.table import WeightsError

_MERGE = (
    "merge it into its base model (peft: model.merge_and_unload(), then save_pretrained) and "
    "convert what that writes"
)
# What wraps a model puts this before all names, whoever saves the wrapper.
_WRAPPERS = {
    "base_model.model.": ("peft", f"of a model inside of an adapter: {_MERGE}"),
    "module.": ("DataParallel or DeepSpeed", "of the wrapper: save model.module instead"),
    "_orig_mod.": ("torch.compile", "of the wrapper: save model._orig_mod instead"),
    "_fsdp_wrapped_module.": ("FSDP", "of the wrapper: save a full, unwrapped state dict instead"),
}
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\.base_layer\.")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..+|SCB|weight_format|"
    r"weight_scale|weight_scale_inv|weight_packed|weight_zero_point)$"
)


def check_directory(directory: Path) -> None:
    """Raises WeightsError for the directory of an adapter, or one that is none of a model's."""
    if (directory / "adapter_config.json").is_file():
        raise WeightsError(
            f"{directory}: adapter_config.json says that this is a LoRA adapter, not a model: "
            f"{_MERGE}"
        )


def check_names(source: Weights) -> None:
    """Raises WeightsError, one line, for tensors whose names are those of no model."""
    names = list(source)
    if found := next(filter(_LORA.search, names), None):
        raise WeightsError(f"{source.where}: {found} belongs to a LoRA adapter: {_MERGE}")
    if found := next(filter(_QUANTISED.search, names), None):
        raise WeightsError(
            f"{source.where}: {found} belongs to quantised weights, which cannot be read; take "
            "the release that is not quantised"
        )
    for prefix, (who, what) in _WRAPPERS.items():
        if sum(name.startswith(prefix) for name in names) > len(names) / 2:
            raise WeightsError(
                f"{source.where}: the names begin with {prefix} as {who} writes them, {what}"
            )
