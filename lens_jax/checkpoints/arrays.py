"""Arrays by name: the leaves of a tree, stacks of layers in memory and single layers on disk."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from lens_jax.distribution import processes
from lens_jax.files import CheckpointError
from lens_jax.models.parameters import STACKED


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as "language/layers/q_proj/kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(leaves: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`: nested dictionaries, list indices as ints."""
    nested: dict[Any, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = (int(p) if p.isdecimal() else p for p in name.split("/"))
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def load(directory: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Some of the arrays of an orbax checkpoint, with the dtypes and shardings of `like`."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(directory, like)


def unstack(nested: Mapping[Any, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """A nested state dict as (name, tensor) pairs, one tensor a layer.

    `{"language": {"layers": {"q_proj": {"kernel": [L, D, H]}}}}` gives
    `("language/layers/0/q_proj/kernel", [D, H])` and so on; names outside `STACKED` are the path.
    """
    for name, leaf in flatten(nested).items():
        if jax.process_count() == 1:
            leaf = np.asarray(leaf)
        prefix = _stacked_prefix(name)
        if prefix is None:
            yield name, processes.whole(leaf)
        else:
            rest = name.removeprefix(prefix + "/")
            for i in range(leaf.shape[0]):
                yield f"{prefix}/{i}/{rest}", processes.whole(leaf[i])


def stack(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `unstack`: nested dicts, layers stacked on axis 0, list indices as ints."""
    leaves = {}
    for name, members in group_layers(flat).items():
        leaves[name] = flat[members[0]] if name in flat else np.stack([flat[m] for m in members])
    return nest(leaves)


def layer_of(name: str) -> tuple[str, int | None]:
    """The path in memory of a tensor on disk, and its layer there if it is one of a stack."""
    prefix = _stacked_prefix(name)
    match = re.fullmatch(r"(\d+)/(.+)", name.removeprefix(f"{prefix}/")) if prefix else None
    return (name, None) if match is None else (f"{prefix}/{match[2]}", int(match[1]))


def group_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Name in memory -> names on disk, in layer order; a gap in the layers is an error."""
    layers: dict[str, dict[int, str]] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        path, layer = layer_of(name)
        if layer is None:
            groups[name] = [name]
        else:
            layers.setdefault(path, {})[layer] = name
    depth = {
        p: 1 + max((max(m) for n, m in layers.items() if n.startswith(p)), default=-1)
        for p in STACKED
    }
    for name, members in layers.items():
        missing = set(range(depth[_stacked_prefix(name)])) - members.keys()
        if missing:
            raise CheckpointError(f"{name}: layer {min(missing)} is missing")
        groups[name] = [members[i] for i in sorted(members)]
    return groups


def _stacked_prefix(name: str) -> str | None:
    return next((p for p in STACKED if name.startswith(p + "/")), None)
