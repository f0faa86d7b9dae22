"""Golden's arrays as this library's inputs."""

import json
from pathlib import Path

import numpy as np
from flax import nnx

from lens_jax import checkpoints
from lens_jax.convert_weights import lens_table, load_lens_state
from lens_jax.data.images import arrange_windows, window_layout
from lens_jax.data.prompts import rope_positions
from lens_jax.model_configs.lens import read_lens
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensConfig, LensModel, abstract


def read_json(file: Path):
    return json.loads(Path(file).read_text())


def lens_config(golden_dir: Path, positions: str) -> LensConfig:
    tiny = golden_dir / "lens_tiny"
    hf = read_json(tiny / "config.json")
    return read_lens(
        {
            "mllm": hf,
            "sam": read_json(tiny / "sam2_config.json"),
            "num_queries": hf["num_of_query"],
            "context_positions": positions,
        }
    )


def lens_model(golden_dir: Path, tensors, positions: str) -> LensModel:
    config = lens_config(golden_dir, positions)
    definition, state = nnx.split(abstract(config))
    nnx.replace_by_pure_dict(state, load_lens_state(tensors, config))
    return nnx.merge(definition, state)


def prompts(config: LensConfig, ids, mask, pixel_values, grids, sam_images) -> Prompts:
    """Left-padded ids and patches of all pictures in a row, as transformers takes them."""
    vision = config.mllm.vision
    grids = [tuple(int(v) for v in grid[1:]) for grid in grids]
    ends = np.cumsum([rows * columns for rows, columns in grids])
    units = vision.window_size // vision.patch_size // vision.merge_size
    layouts = [window_layout(grid, units, vision.merge_size) for grid in grids]
    windows = max(len(source) for source, _, _ in layouts)
    length = ids.shape[1]
    rows = []
    for i, (grid, (source, places, slots)) in enumerate(zip(grids, layouts, strict=True)):
        patches = pixel_values[ends[i] - grid[0] * grid[1] : ends[i]]
        patches, patch_mask = arrange_windows(patches, source)
        more = ((0, windows - len(source)), (0, 0))
        tokens = ids[i][mask[i] == 1]
        image = np.flatnonzero(tokens == config.mllm.image_token_id)
        index = np.full(length, -1)
        index[image] = slots
        merged = tuple(n // vision.merge_size for n in grid)
        positions, following = rope_positions(len(tokens), int(image[0]), merged)
        after = (0, length - len(tokens))
        rows.append(
            Prompts(
                patches=np.pad(patches, (*more, (0, 0))),
                patch_positions=np.pad(places, (*more, (0, 0))),
                patch_mask=np.pad(patch_mask, more),
                tokens=np.pad(tokens, after),
                image_index=index,
                length=np.int32(len(tokens)),
                positions=np.pad(positions, ((0, 0), after)),
                next_position=np.int32(following),
                sam_pixels=sam_images[i],
            )
        )
    return Prompts(
        **{
            name: np.stack([getattr(row, name) for row in rows])
            for name in Prompts.__dataclass_fields__
        }
    )


def canvas(masks) -> tuple[np.ndarray, np.ndarray]:
    """Masks of different sizes on one canvas, with their sizes."""
    height, width = np.max([m.shape for m in masks], axis=0)
    padded = [np.pad(m, ((0, height - m.shape[0]), (0, width - m.shape[1]))) for m in masks]
    return np.stack(padded).astype(bool), np.array([m.shape for m in masks], np.int32)


def check_sampled(golden, name, x, atol, keep=None):
    """An array against the positions golden stores of it; `keep` marks those that are ours too."""
    shape, index, value = (golden[f"{name}_{part}"] for part in ("shape", "idx", "val"))
    x = np.asarray(x).reshape(shape)
    if keep is not None:
        kept = np.broadcast_to(keep, shape).ravel()[index]
        index, value = index[kept], value[kept]
    assert index.size
    np.testing.assert_allclose(x.ravel()[index], value, rtol=0, atol=atol)


def gradient_norms(config: LensConfig, gradients) -> dict[str, float]:
    """Official name -> norm, of a nested gradient that may hold part of the model."""
    flat = dict(checkpoints.unstack(nnx.to_pure_dict(gradients)))
    return {
        entry.source: float(np.linalg.norm(flat[entry.target].astype(np.float64)))
        for entry in lens_table(config).entries
        if entry.target in flat
    }


def check_gradient_norms(ours: dict[str, float], golden: dict[str, float]) -> None:
    """1e-3 relative; norms below 1e-5 of the total are compared absolutely."""
    total = np.sqrt(sum(v**2 for v in golden.values()))
    wrong = {
        name: (ours.get(name), norm)
        for name, norm in golden.items()
        if name not in ours or abs(ours[name] - norm) > max(1e-3 * norm, 1e-5 * total)
    }
    assert not wrong, (
        f"{len(wrong)} of {len(golden)} gradient norms: {dict(list(wrong.items())[:8])}"
    )
