"""Attention compiled for a TPU that need not be there: splash against XLA, memory and traffic.

The attention of one layer of Qwen2.5-VL-3B and SAM 2 large, bfloat16, as the update runs it:
forward and backward over packed groups and whole images, forward in SAM's frozen encoder. Needs
libtpu, whose compiler runs on any machine; nothing is executed, and no time is measured.

    python benchmarks/attention.py --chip v5e --rows 4 --json attention.json
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from benchmarks import common, frame
from lens_jax.flags import PositiveInt
from lens_jax.models.long_attention import Attention


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    size: common.SizeName = "3b"
    """Size of the model."""
    chip: frame.Chip = "v5e"
    """TPU to compile for."""
    rows: PositiveInt = 4
    """Prompts on a chip."""
    json: Path | None = None
    """File for {name: {ours, theirs, ratio, unit}}."""


def cases(size: common.Size) -> Iterator[tuple[str, Any, tuple[int, int, int, int], bool]]:
    """Name, method of `Attention`, (length, heads, KV heads, head dimensions), with gradients."""
    qwen, group = size.config().mllm, size.group
    heads = qwen.num_heads, qwen.num_kv_heads, qwen.head_dim
    for tokens in (size.completion, size.reasoning):
        own = tokens + size.num_queries
        method = partial(Attention.packed, prompt=size.prompt, group=group)
        name = f"group of {size.prompt} + {group} * ({tokens} + {size.num_queries}) tokens"
        yield name, method, (size.prompt + group * own, *heads), True
    vision = qwen.vision
    units = vision.window_size // vision.patch_size
    windows = -(-size.grid[0] // units) * -(-size.grid[1] // units)
    length = windows * vision.window_patches
    shape = (length, vision.num_heads, vision.num_heads, vision.head_dim)
    yield f"image of {length} patches", Attention.full, shape, True
    sam = size.sam
    heads, side = sam.num_heads * 4, sam.image_size // 16
    shape = (side**2, heads, heads, sam.embed_dim // sam.num_heads)
    yield f"SAM 2: image of {side**2} patches", Attention.full, shape, False


def compile_one(attention: Attention, method, shape, gradients: bool, rows: int, device) -> Any:
    """One layer's attention, compiled for `device`."""
    length, heads, kv_heads, head_dim = shape
    place = SingleDeviceSharding(device)

    def of(*rest, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((rows, length, *rest), dtype, sharding=place)

    parts = [of(n, head_dim) for n in (heads, kv_heads, kv_heads)]
    valid = of(dtype=jnp.bool_)
    if not gradients:
        return jax.jit(partial(method, attention)).lower(*parts, valid).compile()

    def pull(queries, keys, values, valid, cotangent):
        attend = partial(method, attention, valid=valid)
        out, backward = jax.vjp(attend, queries, keys, values)
        return out, backward(cotangent)

    return jax.jit(pull).lower(*parts, valid, parts[0]).compile()


def measure(options: AttentionOptions) -> tuple[str, dict[str, frame.Comparison]]:
    device = frame.chip(options.chip, options.size)
    rows = {}
    for name, *case in cases(common.SIZES[options.size]):
        ours, theirs = (
            compile_one(Attention(kernel), *case, options.rows, device)
            for kernel in ("splash", "xla")
        )
        for what, read in {
            "temporaries": lambda x: x.memory_analysis().temp_size_in_bytes,
            "operands and results": lambda x: x.cost_analysis()["bytes accessed"],
        }.items():
            a, b = read(ours) / 1e6, read(theirs) / 1e6
            rows[f"{name}: {what}"] = frame.Comparison(a, b, b / max(a, 1e-6), "MB")
    title = f"splash (ours) against XLA (theirs), {options.rows} rows, one layer, {options.chip}"
    return title, rows


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, AttentionOptions, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
