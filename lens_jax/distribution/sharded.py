"""Parameters cut over a mesh axis, gathered layer by layer where they are used.

Inside an update each device holds its part of every large parameter. Such a part travels within
`nnx.State` into the forward pass as a `ShardedParameter`, which is no array, and becomes one just
before its layer runs: `layers.scan` and `layers.layer` gather one layer at a time, forward and
again backward. Never is more than one layer whole on a device, and the gradient of a gathered
parameter comes back summed over devices and cut as the parameter is. Left to itself the compiler
moves activations instead, six times as many bytes (docs/tpu.md).
"""

from typing import Any

import jax
from flax import struct
from jax import lax
from jaxtyping import Array


@struct.dataclass
class ShardedParameter:
    """A device's part of a parameter; in a stack, behind axes of layers.

    The layers' axes come off first: only a single layer's part can be gathered.
    """

    value: Array
    mesh_axis: str = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    """The axis that is cut, counted from the end."""
    rank: int = struct.field(pytree_node=False)
    """Axes of the parameter, without those of stacks."""
    dtype: Any = struct.field(pytree_node=False)
    """Type of the products: values are converted to it before they travel."""

    def gather(self) -> Array:
        value = self.value.astype(self.dtype)
        return lax.all_gather(value, self.mesh_axis, axis=value.ndim + self.axis, tiled=True)


def is_sharded(x: Any) -> bool:
    return isinstance(x, ShardedParameter)


def has_sharded_layers(state: Any) -> bool:
    """Whether a stack of layers holds sharded parameters, to be gathered layer by layer."""
    leaves = jax.tree.leaves(state, is_leaf=is_sharded)
    return any(is_sharded(x) and x.value.ndim == x.rank + 1 for x in leaves)


def gather(state: Any) -> Any:
    """The state with its sharded parameters gathered, except those that are still in stacks."""

    def whole(x):
        return x.gather() if is_sharded(x) and x.value.ndim == x.rank else x

    return jax.tree.map(whole, state, is_leaf=is_sharded)
