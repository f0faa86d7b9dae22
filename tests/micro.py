"""A LENS of some ten thousand parameters, and random prompts for it."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lens_jax.data.images import arrange_windows, window_layout
from lens_jax.data.prompts import rope_positions
from lens_jax.models.inputs import Prompts, Targets
from lens_jax.models.lens import LensConfig, LensModel, abstract
from lens_jax.models.qwen_vl.config import QwenVLConfig, VisionConfig
from lens_jax.models.sam.config import Sam2Config, SamConfig

CONFIG = LensConfig(
    mllm=QwenVLConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=67,
        rope_theta=1000.0,
        mrope_section=(1, 1, 2),
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        image_token_id=66,
        vision=VisionConfig(
            family="qwen2_5_vl",
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            full_attention_blocks=(1,),
            window_size=56,
        ),
    ),
    sam=Sam2Config(
        image_size=64,
        embed_dim=8,
        num_heads=1,
        stages=(1, 1, 1, 1),
        global_att_blocks=(2,),
        window_pos_embed_bkg_spatial_size=(4, 4),
        window_spec=(8, 4, 4, 2),
        d_model=16,
        decoder_depth=1,
        decoder_heads=2,
        decoder_mlp_dim=24,
        iou_head_depth=2,
        iou_head_hidden_dim=16,
    ),
    num_queries=5,
    connector_depth=1,
    connector_heads=4,
)


# The same language model behind Qwen2-VL's vision tower.
QWEN2_VL = dataclasses.replace(
    CONFIG,
    mllm=dataclasses.replace(
        CONFIG.mllm,
        vision=VisionConfig(
            family="qwen2_vl",
            depth=2,
            hidden_size=16,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=32,
            full_attention_blocks=(0, 1),
        ),
    ),
)

# The same with SAM 1, whose windows reach beyond the map.
WITH_SAM1 = dataclasses.replace(
    CONFIG,
    sam=SamConfig(
        image_size=64,
        embed_dim=16,
        depth=2,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=3,
        mlp_dim=24,
        d_model=16,
        decoder_depth=1,
        decoder_heads=2,
        decoder_mlp_dim=24,
        iou_head_depth=2,
        iou_head_hidden_dim=16,
    ),
)


def model(config: LensConfig = CONFIG, seed: int = 0) -> LensModel:
    """Weights of every kind, none at its trivial value; drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    definition, state = nnx.split(abstract(config))

    def draw(path, x):
        values = rng.standard_normal(x.shape).astype(np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * values
        if path[-1] == "kernel":
            return values * x.shape[-2] ** -0.5
        return values * (0.5 if path[-1] in ("embedding", "queries") else 0.1)

    flat = flatten_dict(nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, unflatten_dict({k: draw(k, x) for k, x in flat.items()}))
    return nnx.merge(definition, state)


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt without padding; patches in `patchify`'s order, which is transformers' too."""

    tokens: np.ndarray
    grid: tuple[int, int]
    patches: np.ndarray
    sam_pixels: np.ndarray


def row(config: LensConfig, grid: tuple[int, int], text: tuple[int, int], seed: int) -> Row:
    """A picture of `grid` patches with (before, after) tokens of text around it."""
    rng = np.random.default_rng(seed)
    mllm = config.mllm
    before, after = (rng.integers(0, mllm.image_token_id - 8, n) for n in text)
    image = np.full(grid[0] * grid[1] // 4, mllm.image_token_id)
    side = config.sam.image_size
    return Row(
        np.concatenate([before, image, after]).astype(np.int32),
        grid,
        rng.standard_normal((grid[0] * grid[1], mllm.vision.patch_dim)).astype(np.float32),
        rng.integers(0, 256, (side, side, 3)).astype(np.uint8),
    )


def collate(
    config: LensConfig, rows: Sequence[Row], *, more_tokens: int = 0, more_windows: int = 0
) -> Prompts:
    """Rows as a batch; what is padding holds noise, which must not matter."""
    rng = np.random.default_rng(99)
    vision = config.mllm.vision
    units = vision.window_units
    layouts = [window_layout(r.grid, units, vision.merge_size) for r in rows]
    length = max(len(r.tokens) for r in rows) + more_tokens
    windows = max(len(source) for source, _, _ in layouts) + more_windows
    out = []
    for r, (source, places, slots) in zip(rows, layouts, strict=True):
        patches, mask = arrange_windows(r.patches, source)
        patches[~mask] = rng.standard_normal((int((~mask).sum()), patches.shape[-1]))
        free = (windows - len(source), *patches.shape[1:])
        n = len(r.tokens)
        image = np.flatnonzero(r.tokens == config.mllm.image_token_id)
        index = np.full(length, -1, np.int32)
        index[image] = slots
        positions, following = rope_positions(n, int(image[0]), (r.grid[0] // 2, r.grid[1] // 2))
        out.append(
            Prompts(
                patches=np.concatenate([patches, rng.standard_normal(free, np.float32)]),
                patch_positions=np.pad(places, ((0, free[0]), (0, 0), (0, 0))),
                patch_mask=np.pad(mask, ((0, free[0]), (0, 0))),
                tokens=np.append(r.tokens, rng.integers(0, 8, length - n)).astype(np.int32),
                image_index=index,
                length=np.int32(n),
                positions=np.pad(positions, ((0, 0), (0, length - n))),
                next_position=np.int32(following),
                sam_pixels=r.sam_pixels,
            )
        )
    return Prompts(**{name: np.stack([getattr(p, name) for p in out]) for name in vars(out[0])})


def targets(batch: int, seed: int = 0, canvas=(24, 30), answer: int = 6, vocabulary: int = 58):
    """Truth of ragged sizes on one canvas, with noise where it does not count."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 40, (batch, 2))
    return Targets(
        box=np.concatenate([corner, corner + rng.integers(5, 40, (batch, 2))], 1).astype("f4"),
        mask=rng.random((batch, *canvas)) < 0.4,
        mask_size=np.stack([rng.integers(9, n + 1, batch) for n in canvas], 1).astype(np.int32),
        answer=rng.integers(0, vocabulary, (batch, answer)).astype(np.int32),
        answer_length=rng.integers(1, answer + 1, batch).astype(np.int32),
    )


def close(ours, theirs, tolerance: float = 2e-5, name: str = "") -> None:
    """Equal up to `tolerance` of the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, name
    limit = tolerance * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=name)


def same_gradients(ours, theirs, tolerance: float = 1e-4) -> None:
    """Trees of gradients, each tensor by its norm; tensors without weight in the whole apart."""
    ours, theirs = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(t)}
        for t in (ours, theirs)
    )
    assert ours.keys() == theirs.keys()
    norms = {k: np.linalg.norm(np.asarray(v, np.float64)) for k, v in theirs.items()}
    total = np.linalg.norm(list(norms.values()))
    gap = {k: np.linalg.norm(np.asarray(ours[k], np.float64) - theirs[k]) for k in theirs}
    wrong = {k: (v, norms[k]) for k, v in gap.items() if v > tolerance * norms[k] + 1e-6 * total}
    assert not wrong, wrong
