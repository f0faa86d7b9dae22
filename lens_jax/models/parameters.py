"""LENS's parameters by name: stacks of layers, parts of the model, logical axes.

A parameter's name is its path in the model, `language/layers/q_proj/kernel`.
"""

import re
from collections.abc import Collection
from typing import Any

from flax import nnx

from lens_jax.distribution.axes import ParameterAxes

# Modules whose parameters carry a leading axis of layers in memory; on disk each layer has its own.
STACKED = ("visual/blocks", "language/layers", "context/blocks")
# Modules whose layers are stacked only when they run (`layers.stacks`).
STACKED_WHEN_RUN = ("sam/image_encoder/trunk/blocks",)

# The parts of a model that may train. SAM's encoder includes what it adds to image features, its
# decoder the prompt encoder.
PARTS = {
    "visual": r"visual/",
    "language": r"language/",
    "context": r"context/",
    "sam_encoder": r"sam/(?!sam_prompt_encoder/|sam_mask_decoder/)",
    "sam_decoder": r"sam/(sam_prompt_encoder|sam_mask_decoder)/",
}
POLICY = ("visual", "language")  # the parts that read and generate text
CONSTANTS = re.compile(r"/positional_encoding_gaussian_matrix$")  # no part's, never trained


def select(parts: Collection[str], kind: type[nnx.Variable] = nnx.Param) -> nnx.filterlib.Filter:
    """The filter, for `nnx.split`, of the variables of one kind in some of `PARTS`."""
    within = re.compile("|".join(PARTS[part] for part in parts) if parts else r"(?!)")

    def selected(path: tuple[Any, ...], _: Any) -> bool:
        name = "/".join(map(str, path))
        return bool(within.match(name)) and not CONSTANTS.search(name)

    return nnx.All(kind, selected)


# Parameter name -> logical axes. The vision tower's and the context module's fused qkv is not cut
# into heads: a cut would not fall between q, k and v.
AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"language/.*q_proj/kernel$", ("embed", "heads")),
    (r"language/.*q_proj/bias$", ("heads",)),
    (r"language/.*[kv]_proj/kernel$", ("embed", "kv_heads")),
    (r"language/.*[kv]_proj/bias$", ("kv_heads",)),
    (r"language/.*o_proj/kernel$", ("heads", "embed")),
    (r"(embed_tokens|lm_head)/embedding$", ("vocab", "embed")),
    (r"(gate_proj|up_proj|fc1)/kernel$", ("embed", "mlp")),
    (r"(gate_proj|up_proj|fc1)/bias$", ("mlp",)),
    (r"(down_proj|fc2)/kernel$", ("mlp", "embed")),
    (r"qkv/kernel$", ("embed", None)),
    (r"context/conv/kernel$", (None, "embed", None)),
)


def parameter_axes(kv_heads: int) -> ParameterAxes:
    """The axes of LENS's parameters. The KV heads, so many, are cut between heads or not at all."""
    scanned = (*STACKED, *STACKED_WHEN_RUN)
    return ParameterAxes(AXES, STACKED, scanned, {"kv_heads": kv_heads})
