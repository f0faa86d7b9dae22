"""Attention kernels of accelerators: splash (Pallas) on TPU, cuDNN on GPU."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lens_jax.models.layers import SAVED

LANES = 128
SHIFT = 16
# Queries, and keys, of a block. Larger ones make fewer steps and waste more at the mask's edges;
# the scores of 640, in float32, still fit into the vector memory of every TPU since v4.
BLOCKS = (640, 512, 384)


def splash_refusal(device: jax.Device) -> str | None:
    """Why splash attention does not run on `device`, if it does not."""
    return None if device.platform == "tpu" else f"runs on TPU, not on {device.platform}"


def cudnn_refusal(device: jax.Device, dtype, head_dims: tuple[int, ...]) -> str | None:
    """Why cuDNN does not attend on `device`, if it does not."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"runs on NVIDIA GPUs, not on {device.platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit numbers, not {jnp.dtype(dtype).name}"
    if wrong := [h for h in head_dims if h > 128 or h % 8]:
        return f"takes heads of at most 128 dimensions, a multiple of 8, not {wrong[0]}"
    return None


@dataclasses.dataclass(frozen=True)
class PackedMask(masks.Mask):
    """Tokens of `[prompt | own_1 | own_2 | …]` see the prompt and their own part, causally.

    The kernel computes the mask from positions: `rows` hold a token's position and, above SHIFT
    bits, that of the first token of its part (0 in the prompt). As an array in memory the mask
    would cost more traffic than keys and values.
    """

    length: int
    prompt: int
    part: int

    def __post_init__(self):
        if self.length > 1 << SHIFT - 1:
            raise ValueError(
                f"{self.length} tokens in a packed sequence: splash attention takes at most "
                f"{1 << SHIFT - 1} here; make prompts or groups smaller, or use attention: xla"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    @property
    def q_sequence(self) -> Int[np.ndarray, "L"]:
        index = np.arange(self.length, dtype=np.int32)
        own = np.maximum(index - self.prompt, 0) // self.part * self.part + self.prompt
        return np.where(index < self.prompt, 0, own << SHIFT).astype(np.int32) | index

    @property
    def mask_function(self) -> "PackedMask":
        return self

    def __call__(self, rows, columns):
        earlier = (rows & (1 << SHIFT) - 1) >= columns
        return earlier & ((columns < self.prompt) | (columns >= rows >> SHIFT))

    def __getitem__(self, block) -> Bool[np.ndarray, "l m"]:
        rows, columns = block
        return self(self.q_sequence[rows][:, None], np.arange(self.length)[columns])


def splash(
    queries: Float[Array, "B L N H"],
    keys: Float[Array, "B L K H"],
    values: Float[Array, "B L K H"],
    valid: Bool[Array, "B L"],
    *,
    prompt: int | None = None,
    group: int = 0,
) -> Float[Array, "B L N H"]:
    """Splash attention to all valid keys, or with `prompt` to those that `PackedMask` shows.

    Blocks that the mask rules out are not computed; scores never leave the core's vector memory,
    forward or backward. KV heads are not repeated.

    Every token sees the first one, so that each row of scores has a valid key and stays finite if
    that one is valid.
    """
    length, heads, head_dim = queries.shape[1:]
    padded, block = _blocks(length)
    mask = masks.FullMask((padded, padded))
    if prompt is not None:
        mask = PackedMask(padded, prompt, part=(length - prompt) // group if group else padded)
    kernel = splash_lib.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash_lib.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=SAVED,
    )
    lengthen = lambda x: jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    # Only tokens of one segment see each other: segment 1 holds all queries and the valid keys.
    valid = lengthen(valid).astype(jnp.int32)
    segments = splash_lib.SegmentIds(jnp.ones_like(valid), valid)
    arrays = (lengthen(x).swapaxes(1, 2) for x in (queries * head_dim**-0.5, keys, values))
    return jax.vmap(kernel)(*arrays, segments).swapaxes(1, 2)[:, :length]


def _blocks(length: int) -> tuple[int, int]:
    """The padded length and its block size: the least padding, then the largest block."""
    up = lambda size: -(-length // size) * size  # noqa: E731
    sizes = {min(size, up(LANES)) for size in BLOCKS}
    return min(((up(size), size) for size in sizes), key=lambda pair: (pair[0], -pair[1]))


def cudnn(
    queries: Float[Array, "B S N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    mask: Bool[Array, "B S T"],
) -> Float[Array, "B S N H"]:
    """cuDNN's fused attention; the mask becomes an additive one of 16 bits that heads share."""
    # With a mask, backward passes take even lengths only.
    s, t = mask.shape[1:]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))  # noqa: E731
    mask = jnp.pad(mask, ((0, 0), (0, s % 2), (0, t % 2)))[:, None]
    out = jax.nn.dot_product_attention(
        even(queries), even(keys), even(values), mask=mask, implementation="cudnn"
    )
    return out[:, :s]


def per_device(function: Callable, mesh: Mesh | None, *, kv_heads: int) -> Callable:
    """`function(queries, keys, values, valid)`, on every device for its rows.

    Heads are cut over the mesh axis `tensor` if the KV heads divide; otherwise each device computes
    all heads.
    """
    # Inside of another shard_map, such as an update's, rows are a device's own already.
    context = jax.sharding.get_abstract_mesh()
    if mesh is None or (mesh.size == 1 and not context.manual_axes):
        return function
    # Even one device: Pallas refuses to be inside of a shard_map that leaves an axis out.
    axes = set(mesh.axis_names) - set(context.manual_axes)
    if not axes:
        return function
    rows = tuple(axis for axis in ("data", "fsdp") if axis in axes) or None
    heads = "tensor" if "tensor" in axes and kv_heads % mesh.shape["tensor"] == 0 else None
    tokens = P(rows, None, heads)
    return jax.shard_map(
        function,
        mesh=None if context.manual_axes else mesh,
        in_specs=(tokens, tokens, tokens, P(rows)),
        out_specs=tokens,
        axis_names=axes,
        check_vma=False,
    )
