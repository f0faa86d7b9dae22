"""The device mesh, and the one table that says how parameters lie on it.

Mesh axes: `data` (copies of the model), `fsdp` (parameters, moments and batch in parts), `tensor`
(heads, MLPs, vocabulary in parts). Batches are sharded over (`data`, `fsdp`). On one device every
rule vanishes.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.checkpoints import STACKED
from lens_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# Parameter path -> logical axes of its last dimensions; a stacked parameter has `layers` in front.
# The vision tower's and the context module's fused qkv is not cut into heads: a cut would not fall
# between q, k and v.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
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

# Logical axis -> mesh axis.
LOGICAL = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Gathering an array smaller than this costs more time than the memory is worth.
MIN_SHARDED_ELEMENTS = 2**18


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    rows: int | None = None,
) -> Mesh:
    """The mesh a config names, or the best one for the devices present.

    That is `fsdp` over all of them: it divides the batch as `data` does and large parameters too.
    If batches of `rows` do not divide by so many, `tensor` takes the factor that is too much.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if all(size is None for size in sizes.values()):
        sizes["fsdp"] = math.gcd(len(devices), rows or 0)
        sizes["tensor"] = len(devices) // sizes["fsdp"]
    shape = tuple(size or 1 for size in sizes.values())
    named = " x ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    wanted = math.prod(shape)
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise ConfigError(f"{named} = {wanted} devices, but {len(devices)} are present")
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 3, devices=devices[:wanted])


def parameter_spec(
    path: str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    kv_heads: int = 1,
    min_elements: int = MIN_SHARDED_ELEMENTS,
) -> P:
    """How the parameter at `path` ("language/layers/q_proj/kernel") of (stacked) `shape` is cut.

    An optimizer moment lies as its parameter does: only the end of the path counts. An axis that
    does not divide is left whole; `fsdp` then goes to the largest other dimension that does. KV
    heads (`kv_heads` of them) are cut between heads or not at all.
    """
    if math.prod(shape) < min_elements:
        return P()
    logical = next((axes for rule, axes in PARAMETERS if re.search(rule, path)), ())
    stacked = len(shape) - len(logical)
    if stacked < 0:
        return P()
    spec: list[str | None] = [None] * len(shape)
    for dim, name in enumerate(logical, start=stacked):
        axis = LOGICAL.get(name) if name else None
        parts = kv_heads if name == "kv_heads" else shape[dim]
        if axis and mesh.shape[axis] > 1 and parts % mesh.shape[axis] == 0:
            spec[dim] = axis
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and "fsdp" not in spec and len(shape) > 1:
        # Not the axis of layers: the scan would gather one layer's parameters from one device.
        first = stacked if logical else int(any(f"{p}/" in path for p in STACKED))
        free = [d for d in range(first, len(shape)) if not spec[d] and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)


def shardings(tree: Any, mesh: Mesh, *, kv_heads: int = 1, **options: Any) -> Any:
    """A NamedSharding for every leaf (array, ShapeDtypeStruct) of parameters or training state."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = parameter_spec(name, np.shape(leaf), mesh, kv_heads=kv_heads, **options)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def sampling_shardings(tree: Any, mesh: Mesh, *, kv_heads: int = 1) -> Any:
    """The layout of sampling: cut over `tensor` alone, whole on every part of `data` and `fsdp`."""

    def gather(place: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, P(*(axis if axis == "tensor" else None for axis in place.spec)))

    return jax.tree.map(gather, shardings(tree, mesh, kv_heads=kv_heads))


def num_parts(mesh: Mesh) -> int:
    """How many parts batches come in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over (`data`, `fsdp`), for every array of a batch."""
    return NamedSharding(mesh, BATCH)


def by_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function` run by each device on the rows it holds, and no longer than these need.

    Arguments and results are sharded as batches are.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=BATCH, out_specs=BATCH, check_vma=False)


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from the rows (numpy, [b, ...]) that this process has read."""
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), batch)
