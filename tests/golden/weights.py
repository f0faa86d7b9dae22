"""The golden set stores a recipe instead of weights: draws the tensors, writes them as files."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]


def recipe(golden_dir: Path) -> dict:
    return json.loads((Path(golden_dir) / "lens_tiny" / "weights.json").read_text())


def _draw(seed: int, shape: list[int]) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def build(golden_dir: Path) -> Tensors:
    """Every tensor of the official state dict (tied ones left out): official name -> float32."""
    return {
        name: _draw(r["seed"], r["shape"]) * np.float32(r["std"]) + np.float32(r["mean"])
        for name, r in recipe(golden_dir)["tensors"].items()
    }


def reference(golden_dir: Path) -> Tensors:
    """The policy's tensors with the Qwen part moved to where GRPO's reference model stands."""
    drawn, tensors = recipe(golden_dir), build(golden_dir)
    for name, delta in drawn["reference_delta"].items():
        step = _draw(delta["seed"], drawn["tensors"][name]["shape"])
        tensors[name] = tensors[name] + step * np.float32(delta["std"])
    return tensors


def mllm_tensors(golden_dir: Path, new_names: bool = False) -> Tensors:
    """Plain Qwen2.5-VL; `new_names` as transformers >= 4.52 spells them."""
    drawn, tensors = recipe(golden_dir), build(golden_dir)
    kept = {n: x for n, x in tensors.items() if n.startswith(("visual.", "model.", "lm_head."))}
    return {drawn["hf_names_new"].get(n, n) if new_names else n: x for n, x in kept.items()}


def sam_tensors(golden_dir: Path, junk: bool = True) -> Tensors:
    """SAM 2 in its original names, with the memory modules' tensors a real file holds."""
    tensors = {
        n.removeprefix("sam."): x for n, x in build(golden_dir).items() if n.startswith("sam.")
    }
    if junk:
        shapes = recipe(golden_dir)["ignored_in_real_checkpoints"]["sam2_original"]
        tensors |= {name: np.full(shape, 7, np.float32) for name, shape in shapes.items()}
    return tensors


def lens_tensors(golden_dir: Path, junk: bool = True) -> Tensors:
    """The official LENS state dict, with the unused memory tensors of stage-2 checkpoints."""
    tensors = build(golden_dir)
    if junk:
        shapes = recipe(golden_dir)["ignored_in_real_checkpoints"]["lens_stage2"]
        tensors |= {name: np.full(shape, 7, np.float32) for name, shape in shapes.items()}
    return tensors


def write_safetensors(directory: Path, tensors: Mapping[str, np.ndarray], shards: int = 1) -> None:
    """`model.safetensors`, or numbered shards with their index, as Hugging Face writes them."""
    tensors = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _copy_text_files(golden_dir: Path, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for file in (Path(golden_dir) / "lens_tiny").glob("*.json"):
        if not file.name.startswith(("config", "weights", "sam2_config")):
            shutil.copyfile(file, directory / file.name)


def write_mllm(golden_dir: Path, directory: Path, new_names: bool = False, shards: int = 1) -> Path:
    """A Hugging Face directory of the plain Qwen2.5-VL."""
    _copy_text_files(golden_dir, directory)
    config = Path(golden_dir) / "lens_tiny" / "config_plain_qwen2_5_vl.json"
    shutil.copyfile(config, directory / "config.json")
    write_safetensors(directory, mllm_tensors(golden_dir, new_names), shards)
    return directory


def write_lens(
    golden_dir: Path,
    directory: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    shards: int = 1,
) -> Path:
    """An official LENS directory, of `lens_tensors` unless others are given."""
    _copy_text_files(golden_dir, directory)
    for name in ("config.json", "sam2_config.json"):
        shutil.copyfile(Path(golden_dir) / "lens_tiny" / name, directory / name)
    write_safetensors(directory, lens_tensors(golden_dir) if tensors is None else tensors, shards)
    return directory


def write_sam(golden_dir: Path, directory: Path, form: str = "safetensors") -> Path:
    """SAM 2's weights with `sam2_config.json` beside them; returns the weights file.

    `form` is "safetensors", or "pt" for the original nesting {"model": state dict} (needs torch).
    """
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(
        Path(golden_dir) / "lens_tiny" / "sam2_config.json", directory / "sam2_config.json"
    )
    tensors = sam_tensors(golden_dir)
    if form == "safetensors":
        file = directory / "sam2.safetensors"
        save_file({n: np.asarray(x, order="C") for n, x in tensors.items()}, file)
    else:
        import torch

        file = directory / "sam2.pt"
        torch.save({"model": {n: torch.from_numpy(x) for n, x in tensors.items()}}, file)
    return file
