"""The device mesh, and the one table that says how parameters lie on it.

Mesh axes: `data` (copies of the model), `fsdp` (parameters, moments and batch in parts), `tensor`
(heads, MLPs, vocabulary in parts). Batches are sharded over (`data`, `fsdp`). On one device every
rule vanishes.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.config import ConfigError, MeshConfig
from lens_jax.distribution.rows import Share
from lens_jax.models.parameters import is_stacked, name_of

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
    Between slices, whose network is slow, lies `data` alone: a gradient a step crosses it.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if all(size is None for size in sizes.values()):
        chips = len(devices) // slices
        sizes["data"] = slices
        sizes["fsdp"] = math.gcd(chips, (rows or 0) // slices)
        sizes["tensor"] = chips // sizes["fsdp"]
    shape = tuple(size or 1 for size in sizes.values())
    named = " x ".join(f"mesh.{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    wanted = math.prod(shape)
    whole = jax.process_count() > 1 or slices > 1
    if wanted > len(devices) or (whole and wanted != len(devices)):
        raise ConfigError(f"{named} = {wanted} devices, but {len(devices)} present")
    if shape[0] % slices:
        raise ConfigError(f"{named}: mesh.data must be a multiple of {slices}, the slices present")
    # A slice's grid of chips may have no axis of the mesh's: 8 x 2 of 4 x 4.
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            shape, devices[:wanted], allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


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
        first = stacked if logical else int(is_stacked(path))
        free = [d for d in range(first, len(shape)) if not spec[d] and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)


def shardings(tree: Any, mesh: Mesh, *, kv_heads: int = 1, **options: Any) -> Any:
    """A NamedSharding for every leaf (array, ShapeDtypeStruct) of parameters or training state."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return place(name_of(path), np.shape(leaf), mesh, kv_heads=kv_heads, **options)

    return jax.tree_util.tree_map_with_path(of, tree)


def place(path: str, shape: Sequence[int], mesh: Mesh, **options: Any) -> NamedSharding:
    """Where the parameter at `path` lies; arguments of `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh, **options))


def sampling_shardings(tree: Any, mesh: Mesh, *, kv_heads: int = 1) -> Any:
    """The layout of sampling: cut over `tensor` alone, whole on every part of `data` and `fsdp`."""

    def gather(place: NamedSharding) -> NamedSharding:
        return NamedSharding(mesh, P(*(axis if axis == "tensor" else None for axis in place.spec)))

    return jax.tree.map(gather, shardings(tree, mesh, kv_heads=kv_heads))


def num_parts(mesh: Mesh) -> int:
    """How many parts batches come in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def equal_parts(rows: int, mesh: Mesh) -> int:
    """As many rows, or so many more that they come in equal parts."""
    return -(-rows // num_parts(mesh)) * num_parts(mesh)


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


def share(mesh: Mesh) -> Share:
    """The rows of a batch that this process's devices hold, as `Pipeline` takes it.

    Which these are, the mesh alone decides: it may put devices of one process anywhere, and along
    `tensor` several processes hold the same rows.
    """
    count, own = num_parts(mesh), jax.process_index()
    holders: dict[int, set[int]] = {}
    for part, device in _rows_of(mesh):
        holders.setdefault(part, set()).add(device.process_index)
    held = [part for part in sorted(holders) if own in holders[part]]
    repeated = tuple(part for part in held if min(holders[part]) < own)
    if len(held) == count and len(repeated) in (0, count):
        return Share(repeated=(0,) if repeated else ())
    return Share(tuple(held), count, repeated)


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Global arrays from the rows (numpy, [b, ...]) that this process has read: its `share`."""
    place, own = batch_sharding(mesh), share(mesh)

    def put(x: np.ndarray) -> jax.Array:
        size = len(x) // len(own.parts)

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            part, rest = divmod(index[0].start or 0, size)
            first = own.parts.index(part) * size + rest
            return x[first : first + len(range(*index[0].indices(size * own.count)))]

        return jax.make_array_from_callback((size * own.count, *x.shape[1:]), place, rows)

    return jax.tree.map(put, batch)


def own_rows(batch: Any, mesh: Mesh) -> Any:
    """The inverse of `global_batch`: the rows (numpy) of this process's `share`."""

    def take(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        x = jax.device_put(x, batch_sharding(mesh))
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])

    return jax.tree.map(take, batch)


def _rows_of(mesh: Mesh) -> Iterator[tuple[int, jax.Device]]:
    """For every device, which part of a batch it holds."""
    parts = mesh.devices.reshape(-1, mesh.shape["tensor"])
    return ((part, device) for part, row in enumerate(parts) for device in row)
