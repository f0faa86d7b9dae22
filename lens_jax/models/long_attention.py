"""Attention of long sequences (packed groups, whole images) by XLA or an accelerator's kernel."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from lens_jax.models import kernels
from lens_jax.models.attention import Prefix, attention, heads_first

LONG = 2**21  # scores that XLA holds at a time: 8 MiB, which caches keep

Kernel = Literal["xla", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of long sequences by one kernel: part of a model's definition.

    The compiler cannot cut splash over devices: with a `mesh`, kernels other than XLA's run on each
    device's rows and, where they divide, heads.
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
            dtype: type of all queries, keys and values to come.
            head_dims: widths of all their heads.

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
        """Attends in sequences `[prompt | own_1 | … | own_G]` of `prompt` tokens and `group` parts.

        A token sees the valid tokens of the prompt and of its own part, up to itself. The first
        token of every prompt must be valid. Tokens that are not valid get arbitrary finite numbers.
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
        """All tokens attend to all valid ones; None: all are valid."""
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
    """The prompt alone, then its completions with it as prefix: no masked-out block is computed."""
    (valid, own_valid), *parts = (_apart(x, prompt, group) for x in (valid, queries, keys, values))
    prompt_parts, own_parts = zip(*parts, strict=True)
    attended = _alone(*prompt_parts, _causal(valid)[:, None])
    if not group:
        return attended
    prefix = Prefix(*map(heads_first, prompt_parts[1:]), valid)
    seen = attention(*own_parts, _causal(own_valid), prefix, at_once=LONG)
    return _together(attended, seen)


def _packed_cudnn(queries, keys, values, valid, *, prompt, group):
    """`_packed` with a copy of the prompt's few KV heads before each completion's own.

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
    """Attention of sequences [B, L, ...] to themselves, as groups of one."""
    return attention(queries[:, None], keys[:, None], values[:, None], mask, at_once=LONG)[:, 0]


def _causal(valid: Bool[Array, "... L"]) -> Bool[Array, "... L L"]:
    return jnp.tri(valid.shape[-1], dtype=bool) & valid[..., None, :]


def _apart(x: Array, prompt: int, group: int) -> tuple[Array, Array | None]:
    """[B, P + G * S, ...] -> [B, P, ...], [B, G, S, ...]; None if there is no group."""
    own = x[:, prompt:].reshape(len(x), group, -1, *x.shape[2:]) if group else None
    return x[:, :prompt], own


def _together(attended: Float[Array, "B P N H"], seen: Float[Array, "B G S N H"]) -> Array:
    return jnp.concatenate([attended, seen.reshape(len(seen), -1, *seen.shape[3:])], axis=1)
