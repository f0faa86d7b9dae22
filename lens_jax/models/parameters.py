"""Names of LENS's parameters: which are stacks of layers, and which part of the model each is of.

A parameter's name is its path in the model, `language/layers/q_proj/kernel`.
"""

import re
from collections.abc import Collection
from typing import Any

import jax
from flax import nnx

# Modules whose parameters carry a leading axis of layers in memory; on disk each layer has its own.
STACKED = ("visual/blocks", "language/layers", "context/blocks")
# Modules whose layers are stacked only when they run (`layers.stacks`).
STACKED_WHEN_RUN = ("sam/image_encoder/trunk/blocks",)

# The parts of a model that may train. What SAM adds to its image features is its encoder's, what
# it does with prompts its decoder's.
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


def name_of(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def is_stacked(name: str) -> bool:
    """True if the first axis of the parameter, or of its moment, is the axis of layers."""
    return any(f"{prefix}/" in name for prefix in STACKED)


def is_scanned(name: str) -> bool:
    """True if `layers.scan` runs the parameter's layers, one at a time."""
    return any(f"{prefix}/" in name for prefix in (*STACKED, *STACKED_WHEN_RUN))
