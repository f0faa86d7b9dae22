"""Golden's weights with a vision tower of Qwen2-VL in the place of Qwen2.5-VL's, as official files.

Names and shapes are written out here: they do not come from the tables under test.
"""

import json
from pathlib import Path

import numpy as np

from tests.golden import weights as golden

DEPTH, WIDTH, MLP_RATIO, HEADS = 2, 16, 2, 2


def vision_config(out: int) -> dict:
    """As Qwen publishes it; `out` is the language model's width."""
    return {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "mlp_ratio": MLP_RATIO,
        "num_heads": HEADS,
        "in_chans": 3,
        "hidden_size": out,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    }


def visual_tensors(out: int) -> golden.Tensors:
    """The tower's tensors under their official names."""
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, 2, 14, 14)}
    linears = {"merger.mlp.0": (4 * WIDTH, 4 * WIDTH), "merger.mlp.2": (out, 4 * WIDTH)}
    norms = ["merger.ln_q"]
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears |= {
            f"{block}.attn.qkv": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj": (WIDTH, WIDTH),
            f"{block}.mlp.fc1": (MLP_RATIO * WIDTH, WIDTH),
            f"{block}.mlp.fc2": (WIDTH, MLP_RATIO * WIDTH),
        }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    rng = np.random.default_rng(0)
    mean = {name: float(name.removesuffix(".weight") in norms) for name in shapes}
    return {
        f"visual.{name}": np.float32(mean[name]) + 0.1 * rng.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def write_mllm(golden_dir: Path, directory: Path) -> Path:
    """A Hugging Face directory of a plain Qwen2-VL."""
    golden.write_mllm(golden_dir, directory)
    _replace_tower(directory, golden.mllm_tensors(golden_dir))
    return directory


def write_lens(golden_dir: Path, directory: Path, *, tied: bool, shards: int = 1) -> golden.Tensors:
    """An official LENS directory on Qwen2-VL; returns its tensors."""
    tensors = golden.lens_tensors(golden_dir, junk=False)
    tensors.pop("lm_head.weight", None)
    if not tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    golden.write_lens(golden_dir, directory, tensors)
    return _replace_tower(directory, tensors, shards, tie_word_embeddings=tied)


def _replace_tower(directory: Path, tensors: golden.Tensors, shards: int = 1, **changes):
    width = tensors["model.norm.weight"].shape[0]
    tensors = {name: x for name, x in tensors.items() if not name.startswith("visual.")}
    tensors |= visual_tensors(width)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "qwen2_vl", "vision_config": vision_config(width), **changes}
    file.write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    golden.write_safetensors(directory, tensors, shards)
    return tensors
