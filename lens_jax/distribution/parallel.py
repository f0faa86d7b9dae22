"""Gradients on a mesh, fully sharded and data-parallel: every device computes those of its rows.

Parameters lie in parts. A layer's are gathered as it runs, forward and again backward, and the sum
of its gradient over devices comes back in parts. Left to itself the compiler would move activations
instead, or compute all rows on all devices; only over `tensor` does it place the collectives.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.distribution import sharding
from lens_jax.distribution.sharded import ShardedParameter, gather
from lens_jax.models.parameters import is_scanned, is_stacked, name_of
from lens_jax.training import state
from lens_jax.training.state import Metrics, Sums

ROWS = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A mesh, the type that parameters have while they are gathered, and options of `shardings`."""

    mesh: Mesh
    dtype: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def differentiate(
        self, sums: Sums, params: nnx.State, constants: Any, batch: Any, portions: int
    ) -> tuple[nnx.State, Metrics]:
        """`state.differentiate`; parameters and gradients lie as `sharding.shardings` says."""
        places = sharding.shardings((params, constants), self.mesh, **self.options)

        def whole(tree, places):
            return jax.tree_util.tree_map_with_path(self._whole, tree, places)

        def local(params, constants, batch):
            gradients, metrics = state.differentiate(
                lambda params, constants, portion: sums(
                    whole(params, places[0]), whole(constants, places[1]), portion
                ),
                params,
                constants,
                batch,
                portions,
            )
            gradients = jax.tree.map(self._reduce, gradients, places[0])
            return gradients, jax.lax.psum(metrics, ROWS)

        specs = jax.tree.map(lambda place: P(*map(_fsdp, place.spec)), places)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(*specs, P(ROWS)),
            out_specs=(specs[0], P()),
            axis_names=set(ROWS),
            check_vma=False,
        )(params, constants, batch)

    def _whole(self, path, leaf, place: NamedSharding):
        cut = [dim for dim, axis in enumerate(place.spec) if _fsdp(axis)]
        if not cut:
            return leaf
        name = name_of(path)
        rank = leaf.ndim - is_stacked(name)
        part = ShardedParameter(leaf, "fsdp", cut[0] - leaf.ndim, rank, self.dtype)
        # `layers.scan` gathers a layer when it runs; all else is gathered before the forward pass.
        return part if is_scanned(name) else gather(part)

    def _reduce(self, gradient, place: NamedSharding):
        """Cut ones are summed over `fsdp` as they are computed."""
        axes = tuple(axis for axis in ROWS if self.mesh.shape[axis] > 1 and axis not in place.spec)
        gradient = jax.lax.psum(gradient, axes) if axes else gradient
        if self.mesh.shape["tensor"] == 1:
            return gradient
        spec = P(*(axis if axis == "tensor" else None for axis in place.spec))
        return jax.lax.with_sharding_constraint(gradient, spec)


def _fsdp(axis: str | None) -> str | None:
    return "fsdp" if axis == "fsdp" else None
