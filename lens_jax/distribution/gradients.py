"""Gradients on a mesh, fully sharded and data-parallel: every device computes those of its rows.

Each device holds a part of every large parameter. The parts of layers enter the forward pass as
`ShardedParameter`s. `layers.scan` gathers them as each layer runs, forward and again backward, and
the sum of a layer's gradient over devices comes back in parts. The compiler places collectives over
`tensor` alone.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lens_jax.distribution import sharding
from lens_jax.distribution.axes import ParameterAxes, name_of
from lens_jax.distribution.sharded import ShardedParameter, gather

Metrics = dict[str, Array]
Loss = Callable[[nnx.State, Any, Any], tuple[Array, Metrics]]
"""`(params, constants, rows)`: the loss and the metrics, summed over rows of a batch."""
ROWS = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a model lies while it is differentiated: parameters as `sharding.shardings` says."""

    mesh: Mesh
    dtype: Any
    """Type that parameters have while they are gathered: that of the products."""
    axes: ParameterAxes


def differentiate(
    loss: Loss,
    params: nnx.State,
    constants: Any,
    batch: Any,
    micro_batches: int = 1,
    layout: Layout | None = None,
) -> tuple[nnx.State, Metrics]:
    """Gradients and metrics of `loss(params, constants, batch)`, summed over the batch.

    Args:
        constants: parameters that are not differentiated.
        micro_batches: each device cuts its rows into so many, one after another.
        layout: where parameters and gradients lie; None is one device.
    """
    if layout is None:
        gradient = partial(jax.grad(loss, has_aux=True), params, constants)
        return accumulate(gradient, batch, micro_batches)
    mesh = layout.mesh
    shardings = sharding.shardings((params, constants), mesh, layout.axes)

    def local(params, constants, batch):
        def local_loss(params, constants, rows):
            sharded = partial(_sharded, layout=layout)
            trees = jax.tree_util.tree_map_with_path(sharded, (params, constants), shardings)
            return loss(*trees, rows)

        gradient = partial(jax.grad(local_loss, has_aux=True), params, constants)
        gradients, metrics = accumulate(gradient, batch, micro_batches)
        gradients = jax.tree.map(partial(_sum_over_devices, mesh), gradients, shardings[0])
        return gradients, jax.lax.psum(metrics, ROWS)

    specs = jax.tree.map(lambda x: P(*map(_fsdp, x.spec)), shardings)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*specs, P(ROWS)),
        out_specs=(specs[0], P()),
        axis_names=set(ROWS),
        check_vma=False,
    )(params, constants, batch)


def accumulate(
    gradient: Callable[[Any], tuple[Any, Metrics]], batch: Any, micro_batches: int
) -> tuple[Any, Metrics]:
    """Sums `gradient(rows)` over equal micro-batches of a batch, one after another.

    Sums, not means: cutting a batch changes nothing but rounding. Rows are dealt out in turn, so
    that a batch sharded over devices stays where it is.
    """
    if micro_batches == 1:
        return gradient(batch)
    deal = lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    batch = jax.tree.map(deal, batch)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, rows):
        # XLA would else move sums over devices behind the loop, and carry whole gradients there.
        sums = jax.tree.map(jax.lax.optimization_barrier, gradient(rows))
        return jax.tree.map(jnp.add, total, sums), None

    return jax.lax.scan(add, zeros, batch)[0]


def _sharded(
    path, leaf: Array, where: NamedSharding, *, layout: Layout
) -> ShardedParameter | Array:
    """A device's part of a parameter, gathered now or, if it is of layers, as each of them runs."""
    cut = [dim for dim, axis in enumerate(where.spec) if _fsdp(axis)]
    if not cut:
        return leaf
    name = name_of(path)
    rank = leaf.ndim - layout.axes.is_stacked(name)
    part = ShardedParameter(leaf, "fsdp", cut[0] - leaf.ndim, rank, layout.dtype)
    return part if layout.axes.is_scanned(name) else gather(part)


def _sum_over_devices(mesh: Mesh, gradient: Array, where: NamedSharding) -> Array:
    """The gradient of what is not cut over `fsdp`; what is, is summed over it as it is computed."""
    axes = tuple(axis for axis in ROWS if mesh.shape[axis] > 1 and axis not in where.spec)
    gradient = jax.lax.psum(gradient, axes) if axes else gradient
    if mesh.shape["tensor"] == 1:
        return gradient
    spec = P(*(axis if axis == "tensor" else None for axis in where.spec))
    return jax.lax.with_sharding_constraint(gradient, spec)


def _fsdp(axis: str | None) -> str | None:
    return "fsdp" if axis == "fsdp" else None
