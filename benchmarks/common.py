"""What the benchmarks share: sizes, random weights and inputs, timing side by side, the report."""

import argparse
import dataclasses
import json
import os
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jaxtyping import Float

from lens_jax.commands import cli
from lens_jax.data.images import arrange_windows, window_layout
from lens_jax.data.prompts import rope_positions
from lens_jax.flags import Flags, PositiveInt, UsageError, from_doc
from lens_jax.models.inputs import Prompts, Targets
from lens_jax.models.lens import LensConfig, LensModel, abstract
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.sam.config import Sam2Config

SizeName = Literal["tiny", "small", "3b"]
Device = Literal["cpu", "gpu"]
# Kinds of TPU that can be compiled for, each with its smallest slice.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and what it is fed: `groups` prompts with one picture of `grid` patches each."""

    qwen: Mapping[str, Any]
    """The language model and vision tower as a Hugging Face config.json."""
    sam: Sam2Config
    num_queries: int
    grid: tuple[int, int]
    prompt: int
    """Tokens of a prompt, image tokens included."""
    completion: int
    reasoning: int
    """Tokens of a completion that thinks first."""
    group: int = 8
    groups: int = 2
    dtype: Any = jnp.float32

    def config(self, context_positions: str = "mrope") -> LensConfig:
        return LensConfig(
            QwenVLConfig.from_hf(self.qwen),
            self.sam,
            num_queries=self.num_queries,
            context_positions=context_positions,
        )


def _qwen(
    *,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocabulary: int,
    rotary: tuple[int, int, int],
    vision: Mapping[str, Any],
) -> dict[str, Any]:
    """A Qwen2.5-VL's config.json; the last token ids of the vocabulary are the vision's."""
    marks = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": list(rotary)},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "out_hidden_size": hidden,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            **vision,
        },
        **{mark: vocabulary - len(marks) + i for i, mark in enumerate(marks)},
    }


SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        qwen=_qwen(
            hidden=64,
            layers=2,
            heads=4,
            ffn=96,
            vocabulary=512,
            rotary=(2, 3, 3),
            vision=dict(
                hidden_size=32,
                intermediate_size=48,
                depth=2,
                num_heads=2,
                fullatt_block_indexes=[1],
            ),
        ),
        sam=Sam2Config(
            image_size=64,
            embed_dim=8,
            num_heads=1,
            stages=(1, 1, 2, 1),
            global_att_blocks=(3,),
            window_pos_embed_bkg_spatial_size=(4, 4),
            window_spec=(8, 4, 4, 2),
            d_model=32,
            decoder_depth=1,
            decoder_heads=2,
            decoder_mlp_dim=48,
            iou_head_hidden_dim=32,
        ),
        num_queries=8,
        grid=(8, 6),
        prompt=24,
        completion=8,
        reasoning=16,
    ),
    "small": Size(
        qwen=_qwen(
            hidden=256,
            layers=6,
            heads=4,
            ffn=704,
            vocabulary=8192,
            rotary=(8, 12, 12),
            vision=dict(
                hidden_size=128,
                intermediate_size=344,
                depth=4,
                num_heads=4,
                fullatt_block_indexes=[3],
            ),
        ),
        sam=Sam2Config(
            image_size=256,
            embed_dim=32,
            num_heads=1,
            stages=(1, 2, 7, 2),
            global_att_blocks=(5, 7, 9),
            window_spec=(8, 4, 14, 7),
        ),
        num_queries=64,
        grid=(34, 46),
        prompt=430,
        completion=40,
        reasoning=256,
    ),
    # Qwen2.5-VL-3B and SAM 2 large.
    "3b": Size(
        qwen=_qwen(
            hidden=2048,
            layers=36,
            heads=16,
            ffn=11008,
            vocabulary=151936,
            rotary=(16, 24, 24),
            vision=dict(
                hidden_size=1280,
                intermediate_size=3420,
                depth=32,
                num_heads=16,
                fullatt_block_indexes=[7, 15, 23, 31],
            ),
        ),
        sam=Sam2Config(),
        num_queries=64,
        grid=(34, 46),
        prompt=430,
        completion=40,
        reasoning=256,
        dtype=jnp.bfloat16,
    ),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The same prompts for both sides; every picture is random."""

    prompts: Prompts
    patches: Float[np.ndarray, "B N C"]
    """`prompts.patches` in the official order: merged units row-major, without padding."""
    targets: Targets


def flags(doc: str) -> Flags:
    """The parser of a benchmark with this docstring, with the flag that all have: --json."""
    parser = Flags(**from_doc(doc))
    parser.add_argument("--json", type=Path, help="File for {name: {ours, theirs, ratio, unit}}.")
    return parser


def parser(doc: str, *, repeats: int) -> Flags:
    """The flags of most benchmarks: --size, --device, --repeats, --json."""
    parser = flags(doc)
    parser.add_argument("--size", choices=SIZES, default="small", help="Of model and inputs.")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="Where ours runs.")
    parser.add_argument(
        "--repeats", type=PositiveInt, default=repeats, help="Rounds of both sides."
    )
    return parser


def run(
    benchmark: Callable[[argparse.Namespace], None], parser: Flags, argv: Sequence[str] | None
) -> int:
    """Calls a benchmark with its flags; returns the exit code, 2 after a mistake."""

    def checked(options: argparse.Namespace) -> None:
        if options.json is not None:  # before minutes are spent on what could not be written
            cli.check_writable(options.json)
        try:
            benchmark(options)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"{error.name} is not installed, which this benchmark needs: pip install -e "
                '".[test]" has it'
            ) from error

    return cli.run_flags(checked, parser, argv)


def use(device: Device, size: SizeName) -> None:
    """Chooses JAX's platform, before anything is computed, and says so."""
    # Otherwise an installed libtpu looks for its chips first.
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
    try:
        cli.announce(f"size {size}", jnp.dtype(SIZES[size].dtype).name)
    except (RuntimeError, AssertionError) as error:  # JAX's, where it finds no such device
        raise UsageError(f"--device {device}: JAX finds none on this machine") from error


def chip(name: str, size: SizeName) -> jax.Device:
    """A TPU of this kind to compile for. None need be there, only libtpu."""
    use("cpu", size)
    # libtpu reads these when it is loaded: nothing to ask about, and not the only process.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[name]).devices[0]


def parameters(model: LensModel, seed: int = 0, dtype: Any = jnp.float32) -> nnx.State:
    """Random parameters for a model of shapes, drawn by numpy, which compiles nothing."""

    def draw(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        values = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(
            x.shape, np.float32
        )
        kind = name.rpartition("/")[2]
        if kind == "scale":
            values = 1 + 0.1 * values
        elif kind == "kernel":
            values *= x.shape[-2] ** -0.5
        else:
            values *= 0.05
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, nnx.state(model))


def random_model(size: Size, seed: int = 0, dtype: Any = None) -> LensModel:
    """A model of this size with random weights; computes in `dtype`, by default the size's."""
    dtype = size.dtype if dtype is None else dtype
    model = abstract(size.config(), dtype=dtype)
    nnx.update(model, parameters(model, seed, dtype))
    return model


def random_inputs(
    size: Size,
    *,
    rows: int | None = None,
    grid: tuple[int, int] | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Inputs:
    """Random pictures between random words, with random truths.

    Args:
        rows: how many; by default the size's `groups`.
        grid: the pictures' (rows, columns) of patches; by default the size's.
        lengths: tokens of each prompt, image tokens included; by default the size's `prompt`.
    """
    rng = np.random.default_rng(seed)
    mllm = QwenVLConfig.from_hf(size.qwen)
    vision = mllm.vision
    grid = grid or size.grid
    units = (grid[0] // vision.merge_size, grid[1] // vision.merge_size)
    images = units[0] * units[1]
    lengths = [size.prompt] * (rows or size.groups) if lengths is None else list(lengths)
    b, p = len(lengths), max(lengths)

    source, places, slots = window_layout(
        grid, vision.window_size // vision.patch_size // vision.merge_size, vision.merge_size
    )
    patches = rng.standard_normal((b, grid[0] * grid[1], vision.patch_dim), np.float32)
    arranged, masks = zip(*(arrange_windows(x, source) for x in patches), strict=True)
    tokens = rng.integers(0, mllm.vocab_size - 8, (b, p)).astype(np.int32)
    index = np.full((b, p), -1, np.int32)
    positions = np.zeros((b, 3, p), np.int32)
    following = np.zeros(b, np.int32)
    for i, length in enumerate(lengths):
        start = (length - images) // 3
        if start < 1:
            raise ValueError(f"a prompt of {length} tokens holds no picture of {images} tokens")
        tokens[i, start - 1] = size.qwen["vision_start_token_id"]
        tokens[i, start : start + images] = mllm.image_token_id
        index[i, start : start + images] = slots
        positions[i, :, :length], following[i] = rope_positions(length, start, units)
    side = size.sam.image_size
    prompts = Prompts(
        patches=np.stack(arranged),
        patch_positions=np.broadcast_to(places, (b, *places.shape)),
        patch_mask=np.stack(masks),
        tokens=tokens,
        image_index=index,
        length=np.array(lengths, np.int32),
        positions=positions,
        next_position=following,
        sam_pixels=rng.integers(0, 256, (b, side, side, 3), np.uint8),
    )
    return Inputs(prompts, patches, _targets(size, b, units, rng))


def _targets(size: Size, b: int, units: tuple[int, int], rng: np.random.Generator) -> Targets:
    """A rectangle in each picture, its box and mask."""
    height, width = units[0] * 28, units[1] * 28
    first = (rng.uniform(0, 0.5, (b, 2)) * (width, height)).astype(np.int32)
    last = first + (rng.uniform(0.2, 0.5, (b, 2)) * (width, height)).astype(np.int32)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    mask = np.stack(
        [
            (rows >= y0) & (rows < y1) & (columns >= x0) & (columns < x1)
            for (x0, y0), (x1, y1) in zip(first, last, strict=True)
        ]
    )
    return Targets(
        box=np.concatenate([first, last], axis=1).astype(np.float32),
        mask=mask,
        mask_size=np.tile(np.array([height, width], np.int32), (b, 1)),
        answer=rng.integers(0, 100, (b, size.completion)).astype(np.int32),
        answer_length=np.full(b, size.completion, np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of a table; `ratio` above 1 is in our favour."""

    ours: float
    theirs: float
    ratio: float
    unit: str


def interleaved(
    sides: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, Float[np.ndarray, "repeats"]]:
    """Seconds of each side, called in turn `repeats` times after one call that does not count.

    A neighbour's load thus falls on all sides alike.
    """
    for side in sides.values():
        jax.block_until_ready(side())
    seconds = {name: np.empty(repeats) for name in sides}
    for i in range(repeats):
        for name, side in sides.items():
            begin = time.perf_counter()
            jax.block_until_ready(side())
            seconds[name][i] = time.perf_counter() - begin
    return seconds


def faster(
    ours: Float[np.ndarray, "repeats"], theirs: Float[np.ndarray, "repeats"], unit: str = "s"
) -> Comparison:
    """Medians of interleaved seconds; the ratio is the median of the rounds' own ratios."""
    medians = statistics.median(ours), statistics.median(theirs)
    return Comparison(*medians, ratio=statistics.median(theirs / ours), unit=unit)


def report(title: str, rows: Mapping[str, Comparison], file: Path | None) -> None:
    """Prints a table; writes `{name: {ours, theirs, ratio, unit}}` to `file`."""
    width = max(map(len, rows))
    print(f"\n{title}\n{'':{width}}  {'ours':>12}  {'theirs':>12}  {'ratio':>7}  unit")
    for name, row in rows.items():
        print(f"{name:{width}}  {row.ours:12.5g}  {row.theirs:12.5g}  {row.ratio:7.2f}  {row.unit}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {name: dataclasses.asdict(row) for name, row in rows.items()}
        file.write_text(json.dumps(values, indent=2) + "\n")
