"""Sizes of the benchmarks, with random weights and inputs for them."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from lens_jax.data.images import arrange_windows, window_layout
from lens_jax.data.prompts import rope_positions
from lens_jax.models.inputs import Prompts, Targets
from lens_jax.models.lens import LensConfig, LensModel, abstract
from lens_jax.models.qwen_vl.config import PRESETS, QwenVLConfig, VisionConfig
from lens_jax.models.sam.config import Sam2Config

SizeName = Literal["tiny", "small", "3b"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and what it is fed: `groups` prompts with one image of `grid` patches each."""

    qwen: QwenVLConfig
    """The language model and its vision tower."""
    sam: Sam2Config
    num_queries: int
    grid: tuple[int, int]
    prompt: int
    """Tokens of a prompt, image tokens included."""
    completion: int
    reasoning: int
    """Tokens of a completion with reasoning."""
    group: int = 8
    groups: int = 2
    dtype: Any = jnp.float32

    def config(self, context_positions: str = "mrope") -> LensConfig:
        return LensConfig(
            self.qwen,
            self.sam,
            num_queries=self.num_queries,
            context_positions=context_positions,
        )


def _qwen(vision: VisionConfig, *, vocab_size: int, **shapes: Any) -> QwenVLConfig:
    """A Qwen2.5-VL whose last token id is the image's."""
    return QwenVLConfig(
        vision=vision,
        vocab_size=vocab_size,
        image_token_id=vocab_size - 1,
        num_kv_heads=2,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        **shapes,
    )


SIZES: dict[SizeName, Size] = {
    "tiny": Size(
        qwen=_qwen(
            VisionConfig(
                family="qwen2_5_vl",
                depth=2,
                hidden_size=32,
                intermediate_size=48,
                num_heads=2,
                out_hidden_size=64,
                full_attention_blocks=(1,),
            ),
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            vocab_size=512,
            mrope_section=(2, 3, 3),
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
            VisionConfig(
                family="qwen2_5_vl",
                depth=4,
                hidden_size=128,
                intermediate_size=344,
                num_heads=4,
                out_hidden_size=256,
                full_attention_blocks=(3,),
            ),
            hidden_size=256,
            intermediate_size=704,
            num_layers=6,
            num_heads=4,
            vocab_size=8192,
            mrope_section=(8, 12, 12),
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
    # With SAM 2 large.
    "3b": Size(
        qwen=PRESETS["Qwen2.5-VL-3B-Instruct"],
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
    """The same prompts for both sides; every image is random."""

    prompts: Prompts
    patches: Float[np.ndarray, "B N C"]
    """`prompts.patches` in the official order: merged units row-major, without padding."""
    targets: Targets


def random_model(
    size: Size, *, seed: int = 0, context_positions: str = "mrope", weights: Any = None
) -> LensModel:
    """A model of this size that computes in the size's dtype, with random weights.

    Args:
        weights: their dtype, by default the size's.
    """
    model = abstract(size.config(context_positions), dtype=size.dtype)

    def draw(path, x):  # by numpy, which compiles nothing
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        values = rng.standard_normal(x.shape, np.float32)
        kind = name.rpartition("/")[2]
        if kind == "scale":
            values = 1 + 0.1 * values
        elif kind == "kernel":
            values *= x.shape[-2] ** -0.5
        else:
            values *= 0.05
        return jnp.asarray(values, weights or size.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model)))
    return model


def random_inputs(
    size: Size,
    *,
    rows: int | None = None,
    grid: tuple[int, int] | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
) -> Inputs:
    """Random images between random words, with random targets.

    Args:
        rows: how many; by default the size's `groups`.
        grid: the images' (rows, columns) of patches; by default the size's.
        lengths: tokens of each prompt, image tokens included; by default the size's `prompt`.
    """
    rng = np.random.default_rng(seed)
    mllm, vision = size.qwen, size.qwen.vision
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
    tokens = rng.integers(0, mllm.image_token_id - 3, (b, p)).astype(np.int32)
    index = np.full((b, p), -1, np.int32)
    positions = np.zeros((b, 3, p), np.int32)
    following = np.zeros(b, np.int32)
    for i, length in enumerate(lengths):
        start = (length - images) // 3
        if start < 1:
            raise ValueError(f"a prompt of {length} tokens holds no image of {images} tokens")
        tokens[i, start - 1] = mllm.image_token_id - 1  # as in `write_qwen_vl`
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
    """A rectangle in each image, its box and mask."""
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
