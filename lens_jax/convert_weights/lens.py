"""LENS's own tensors: the context module, read from official checkpoints or drawn fresh."""

import re

import numpy as np

from lens_jax.convert_weights.qwen_vl import linear
from lens_jax.convert_weights.reader import LazyTensor, Weights
from lens_jax.convert_weights.table import CONV1D, SQUEEZE, Entry, Shape, Table, WeightsError

PREFIXES = ("learnable_query", "connector.", "conv_1d.", "proj_to_sam.")
_INIT_STD = 0.02


def context_table(depth: int) -> Table:
    """Every tensor of the context module; `depth` counts the connector's blocks."""
    entries = [
        Entry("learnable_query", "context/queries", SQUEEZE),
        Entry("connector.pos_embed", "context/pos_embed", SQUEEZE),
        Entry("conv_1d.weight", "context/conv/kernel", CONV1D),
        Entry("conv_1d.bias", "context/conv/bias"),
        *linear("proj_to_sam.0", "context/projection/fc1"),
        *linear("proj_to_sam.2", "context/projection/fc2"),
    ]
    for i in range(depth):
        source, target = f"connector.blocks.{i}", f"context/blocks/{i}"
        for name in ("norm1", "norm2"):
            entries += [
                Entry(f"{source}.{name}.weight", f"{target}/{name}/scale"),
                Entry(f"{source}.{name}.bias", f"{target}/{name}/bias"),
            ]
        for name, ours in (
            ("attn.qkv", "qkv"),
            ("attn.proj", "proj"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        ):
            entries += linear(f"{source}.{name}", f"{target}/{ours}")
    return Table(tuple(entries))


def fresh_context(table: Table, expected: dict[str, Shape], seed: int) -> Weights:
    """A new context module under its official names, float32, every tensor keyed by (seed, place).

    Queries, convolution and linear kernels from N(0, 0.02), norms 1 and 0, biases and the position
    embedding 0: the initialisation the official code intends.
    """

    def tensor(entry: Entry, place: int) -> LazyTensor:
        shape = expected[entry.target]
        kind = entry.target.rsplit("/", 1)[-1]

        def draw() -> np.ndarray:
            if kind == "scale":
                values = np.ones(shape, np.float32)
            elif kind in ("bias", "pos_embed"):
                values = np.zeros(shape, np.float32)
            else:
                values = np.random.default_rng((seed, place)).standard_normal(shape, np.float32)
                values *= np.float32(_INIT_STD)
            # Drawn in the layout it is stored in: the convolution alone is a gigabyte to transpose.
            return entry.transform.inverse(values)

        return LazyTensor(entry.transform.source_shape(shape), np.dtype(np.float32), draw)

    return Weights(
        {entry.source: tensor(entry, place) for place, entry in enumerate(table.entries)},
        "fresh context module",
    )


_NORM = re.compile(r"sam\..*norm(\d|_final_attn)?\.weight")


def check_trained_sam(source: Weights) -> None:
    """Raises WeightsError for the sam.* of a checkpoint after stage 1, which nobody has trained.

    All its norms are as they were made, the same in every channel; a trained one's never are.
    """
    norms = [x.load() for name, x in source.items() if _NORM.fullmatch(name)]
    if norms and all((x == x.flat[0]).all() for x in norms if x.size):
        raise WeightsError(
            f"{source.where}: its sam.* was never trained, as after stage 1 (every norm's "
            "weights are equal): name the true SAM's weights with --sam FILE"
        )
