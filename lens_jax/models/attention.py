"""The one attention of the house: own keys, after the keys of a prefix shared by the group.

Every attention over patches or tokens is a special case. A window of the vision tower is a group
member without prefix; the prompt is a group of one; a completion of the group attends to the
prompt's keys, stored once, and to its own. Softmax runs once over both, in float32.

Long sequences, packed groups and whole pictures, go through `Attention`, which leaves them to the
accelerator's own kernel where there is one.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from lens_jax.models import kernels

MASKED = -1e30  # finite, so that a row without any key stays finite too

Kernel = Literal["xla", "splash", "cudnn"]


@struct.dataclass
class Prefix:
    """Keys and values of the prompt, one copy for all members of a group."""

    keys: Float[Array, "B P K H"]
    values: Float[Array, "B P K H"]
    mask: Bool[Array, "B P"]


def attention(
    queries: Float[Array, "B G S N H"],
    keys: Float[Array, "B G T K H"],
    values: Float[Array, "B G T K H"],
    mask: Bool[Array, "#B #G #S T"],
    prefix: Prefix | None = None,
) -> Float[Array, "B G S N H"]:
    """Grouped-query attention to own keys under `mask` and to all of the prefix's valid keys."""
    b, g, s, n, h = queries.shape
    kv_heads = keys.shape[3]
    queries = (queries * h**-0.5).reshape(b, g, s, kv_heads, n // kv_heads, h)
    own = jnp.einsum("bgskrh,bgtkh->bgkrst", queries, keys, preferred_element_type=jnp.float32)
    own = jnp.where(mask[:, :, None, None], own, MASKED)
    if prefix is None:
        weights = jax.nn.softmax(own).astype(values.dtype)
        out = jnp.einsum("bgkrst,bgtkh->bgskrh", weights, values)
        return out.reshape(b, g, s, n, -1)
    shared = jnp.einsum(
        "bgskrh,bpkh->bgkrsp", queries, prefix.keys, preferred_element_type=jnp.float32
    )
    shared = jnp.where(prefix.mask[:, None, None, None, None], shared, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1)).astype(values.dtype)
    split = prefix.keys.shape[1]
    out = jnp.einsum("bgkrsp,bpkh->bgskrh", weights[..., :split], prefix.values)
    out += jnp.einsum("bgkrst,bgtkh->bgskrh", weights[..., split:], values)
    return out.reshape(b, g, s, n, -1)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of long sequences by one kernel: part of a model's definition.

    The compiler does not cut splash for several devices: with a `mesh`, kernels other than XLA's
    run on each device's rows and, where they divide, heads.
    """

    kernel: Kernel = "xla"
    mesh: Mesh | None = None

    @classmethod
    def choose(
        cls,
        wanted: str,
        mesh: Mesh | None,
        *,
        dtype,
        head_dims: tuple[int, ...],
    ) -> "Attention":
        """The kernel of that name; `auto`: splash on TPU, cuDNN where it can be, else XLA.

        Args:
            mesh: the devices; None: the default one alone.
            dtype: of all queries, keys and values to come.
            head_dims: of these as well.

        Raises:
            ValueError: the named kernel does not run there, and why.
        """
        device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
        refusals = {
            "splash": kernels.splash_refusal(device),
            "cudnn": kernels.cudnn_refusal(device, dtype, head_dims),
            "xla": None,
        }
        if wanted == "auto":
            wanted = next(name for name, refusal in refusals.items() if refusal is None)
        elif refusals[wanted]:
            raise ValueError(f"attention: {wanted} {refusals[wanted]}; use auto or xla")
        return cls(wanted, mesh)

    def packed(
        self,
        queries: Float[Array, "B L N H"],
        keys: Float[Array, "B L K H"],
        values: Float[Array, "B L K H"],
        valid: Bool[Array, "B L"],
        *,
        prompt: int,
        group: int,
    ) -> Float[Array, "B L N H"]:
        """Sequences `[prompt | own_1 | … | own_G]`: P = `prompt` tokens, G = `group` equal parts.

        A token sees the valid ones of the prompt and of its own part, up to itself. The first token
        of every prompt must be valid. What a token that is not valid gets is arbitrary, but finite.
        """
        function = {"xla": _packed, "splash": kernels.splash, "cudnn": _packed_cudnn}[self.kernel]
        function = partial(function, prompt=prompt, group=group)
        return self._run(function, queries, keys, values, valid)

    def full(
        self,
        queries: Float[Array, "B L N H"],
        keys: Float[Array, "B L K H"],
        values: Float[Array, "B L K H"],
        valid: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L N H"]:
        """All see all that is valid; None: everything is."""
        if valid is None:
            valid = jnp.ones(queries.shape[:2], bool)
        function = {"xla": _full, "splash": kernels.splash, "cudnn": _full_cudnn}[self.kernel]
        return self._run(function, queries, keys, values, valid)

    def _run(self, function, queries, keys, values, valid):
        if self.kernel != "xla":
            function = kernels.per_device(function, self.mesh, kv_heads=keys.shape[2])
        return function(queries, keys, values, valid)


XLA = Attention()


def _full(queries, keys, values, valid):
    return _alone(queries, keys, values, valid[:, None, None])


def _full_cudnn(queries, keys, values, valid):
    b, length = valid.shape
    mask = jnp.broadcast_to(valid[:, None], (b, length, length))
    return kernels.cudnn(queries, keys, values, mask)


def _packed(queries, keys, values, valid, *, prompt, group):
    """The prompt by itself, then its completions behind it: no masked-out block is computed."""
    (valid, own_valid), *parts = (_apart(x, prompt, group) for x in (valid, queries, keys, values))
    prompt_parts, own_parts = zip(*parts, strict=True)
    attended = _alone(*prompt_parts, _causal(valid)[:, None])
    if not group:
        return attended
    seen = attention(*own_parts, _causal(own_valid), Prefix(*prompt_parts[1:], valid))
    return _together(attended, seen)


def _packed_cudnn(queries, keys, values, valid, *, prompt, group):
    """As `_packed`, with a copy of the prompt's few KV heads before each completion's own.

    The copies are small; one call for the whole sequence would compute 2.5 times the scores at
    430 + 8 * 104 tokens, 4 times at 430 + 8 * 320.
    """
    (valid, own_valid), *parts = (_apart(x, prompt, group) for x in (valid, queries, keys, values))
    prompt_parts, own_parts = zip(*parts, strict=True)
    attended = kernels.cudnn(*prompt_parts, _causal(valid))
    if not group:
        return attended
    b, g, s = own_valid.shape
    flat = lambda x: x.reshape(b * g, *x.shape[2:])  # noqa: E731

    def behind(shared, own):
        shared = jnp.broadcast_to(shared[:, None], (b, g, *shared.shape[1:]))
        return flat(jnp.concatenate([shared, own], axis=2))

    before = jnp.broadcast_to(valid[:, None, None], (b, g, s, prompt))
    mask = flat(jnp.concatenate([before, _causal(own_valid)], axis=-1))
    keys, values = map(behind, prompt_parts[1:], own_parts[1:])
    seen = kernels.cudnn(flat(own_parts[0]), keys, values, mask)
    return _together(attended, seen.reshape(own_parts[0].shape))


def _alone(queries, keys, values, mask):
    """Sequences [B, L, ...] to themselves: groups of one."""
    return attention(queries[:, None], keys[:, None], values[:, None], mask)[:, 0]


def _causal(valid: Bool[Array, "... L"]) -> Bool[Array, "... L L"]:
    return jnp.tri(valid.shape[-1], dtype=bool) & valid[..., None, :]


def _apart(x: Array, prompt: int, group: int) -> tuple[Array, Array | None]:
    """[B, P + G * S, ...] -> [B, P, ...], [B, G, S, ...]; None if there is no group."""
    own = x[:, prompt:].reshape(len(x), group, -1, *x.shape[2:]) if group else None
    return x[:, :prompt], own


def _together(attended: Float[Array, "B P N H"], seen: Float[Array, "B G S N H"]) -> Array:
    return jnp.concatenate([attended, seen.reshape(len(seen), -1, *seen.shape[3:])], axis=1)
