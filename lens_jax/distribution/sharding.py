"""The device mesh, and how parameters and batches lie on it.

Mesh axes: `data` (copies of the model), `fsdp` (parameters, moments and batch in parts), `tensor`
(heads, MLPs, vocabulary in parts). Batches are sharded over (`data`, `fsdp`). On one device every
rule vanishes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.config import ConfigError, MeshConfig
from lens_jax.distribution.axes import ParameterAxes, name_of
from lens_jax.distribution.rows import Share

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

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
    name: str,
    shape: Sequence[int],
    mesh: Mesh,
    axes: ParameterAxes,
    *,
    min_elements: int = MIN_SHARDED_ELEMENTS,
) -> P:
    """How a parameter of (stacked) `shape`, or its moment, is cut.

    An axis that does not divide is left whole; `fsdp` then goes to the largest other dimension that
    does.
    """
    if math.prod(shape) < min_elements:
        return P()
    logical = axes.logical(name)
    stacked = len(shape) - len(logical)
    if stacked < 0:
        return P()
    spec: list[str | None] = [None] * len(shape)
    for dim, logical_axis in enumerate(logical, start=stacked):
        axis = LOGICAL.get(logical_axis)
        pieces = axes.pieces.get(logical_axis, shape[dim])
        if axis and mesh.shape[axis] > 1 and pieces % mesh.shape[axis] == 0:
            spec[dim] = axis
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and "fsdp" not in spec and len(shape) > 1:
        # Not the axis of layers: the scan would gather one layer's parameters from one device.
        first = stacked if logical else int(axes.is_stacked(name))
        free = [d for d in range(first, len(shape)) if not spec[d] and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = "fsdp"
    return P(*spec)


def shardings(tree: Any, mesh: Mesh, axes: ParameterAxes, **options: Any) -> Any:
    """A NamedSharding for every leaf (array, ShapeDtypeStruct) of parameters or training state."""

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return parameter_sharding(name_of(path), np.shape(leaf), mesh, axes, **options)

    return jax.tree_util.tree_map_with_path(of, tree)


def parameter_sharding(
    name: str, shape: Sequence[int], mesh: Mesh, axes: ParameterAxes, **options: Any
) -> NamedSharding:
    """The sharding of a parameter; arguments of `parameter_spec`."""
    return NamedSharding(mesh, parameter_spec(name, shape, mesh, axes, **options))


def sampling_shardings(tree: Any, mesh: Mesh, axes: ParameterAxes) -> Any:
    """The layout of sampling: cut over `tensor` alone, whole on every part of `data` and `fsdp`."""

    def gather(training: NamedSharding) -> NamedSharding:
        return NamedSharding(
            mesh, P(*(axis if axis == "tensor" else None for axis in training.spec))
        )

    return jax.tree.map(gather, shardings(tree, mesh, axes))


def num_parts(mesh: Mesh) -> int:
    """How many parts batches come in."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def equal_parts(rows: int, mesh: Mesh) -> int:
    """The smallest number of rows from `rows` up that divides into equal parts."""
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
    own = share(mesh)

    def put(x: np.ndarray) -> jax.Array:
        size = len(x) // len(own.parts)

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            part, rest = divmod(index[0].start or 0, size)
            first = own.parts.index(part) * size + rest
            return x[first : first + len(range(*index[0].indices(size * own.count)))]

        shape = size * own.count, *x.shape[1:]
        return jax.make_array_from_callback(shape, batch_sharding(mesh), rows)

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
