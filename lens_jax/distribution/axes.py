"""The axes of a model's parameters, as far as laying them out over devices must know them.

A parameter's name is its path in the model, `language/layers/q_proj/kernel`. Its moments have names
that end with it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class ParameterAxes:
    """The logical axes of a model's parameters, and which parameters are of layers."""

    rules: tuple[tuple[str, tuple[str | None, ...]], ...]
    """Pattern of a name -> logical axes of the parameter's last dimensions. The first that matches
    counts; a stacked parameter has its axis of layers in front."""
    stacked: tuple[str, ...]
    """Modules whose parameters carry a leading axis of layers."""
    scanned: tuple[str, ...]
    """Modules whose layers run one at a time, by `layers.scan`."""
    pieces: Mapping[str, int]
    """Logical axis -> number of equal pieces that it may be cut between, if not anywhere."""

    def logical(self, name: str) -> tuple[str | None, ...]:
        """Logical axes of the last dimensions of a parameter; empty for one without any."""
        return next((axes for rule, axes in self.rules if re.search(rule, name)), ())

    def is_stacked(self, name: str) -> bool:
        return any(f"{module}/" in name for module in self.stacked)

    def is_scanned(self, name: str) -> bool:
        return any(f"{module}/" in name for module in self.scanned)


def name_of(path: tuple[Any, ...]) -> str:
    """The name of the parameter at a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
