"""Broken files of every kind: one line each that names the file, exit code 2, nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lens_jax import checkpoints
from lens_jax.convert_weights import from_torch
from lens_jax.convert_weights.__main__ import main
from lens_jax.convert_weights.reader import open_weights
from tests.golden import weights as golden
from tests.tools.test_convert_weights import GOLDEN

torch = pytest.importorskip("torch")

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """lens/ in two shards, and SAM 2's own file."""
    root = tmp_path_factory.mktemp("whole")
    golden.write_lens(GOLDEN, root / "lens", golden.lens_tensors(GOLDEN, junk=False), 2)
    golden.write_sam(GOLDEN, root / "sam", "pt")
    return root


@pytest.fixture(scope="module")
def converted(whole) -> Path:
    from_torch(whole / "ours", lens=whole / "lens")
    return whole / "ours"


def edit_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_header(file: Path, change: Callable[[dict], str | None]) -> None:
    """Changes a safetensors header, or replaces it by the text that `change` returns."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = change(header) or json.dumps(header)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + size :])


def rewrite(lens: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Other tensors, in one file."""
    source = open_weights(lens)
    tensors = {name: np.array(source[name].load()) for name in source}
    change(tensors)
    for file in lens.glob("*.safetensors*"):
        file.unlink()
    golden.write_safetensors(lens, tensors)


def holding(value: float, dtype=np.float32) -> Callable[[Path, Path], None]:
    def change(tensors):
        x = tensors["model.layers.1.mlp.up_proj.weight"].astype(dtype)
        x[3, 5] = value
        tensors["model.layers.1.mlp.up_proj.weight"] = x

    return lambda lens, _: rewrite(lens, change)


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def in_index(lens: Path, places: dict[str, str]) -> None:
    edit_json(lens / INDEX, lambda index: index["weight_map"].update(places))


def a_name(lens: Path, shard: str) -> str:
    return next(iter(open_weights(lens / shard)))


def doubled(lens: Path, sam: Path) -> None:
    """A tensor of the first shard is in the second one, too."""
    name = a_name(lens, FIRST)
    parts = [open_weights(lens / shard) for shard in (FIRST, SECOND)]
    tensors = {n: np.array(parts[1][n].load()) for n in parts[1]}
    tensors[name] = np.array(parts[0][name].load()) + 1
    golden.write_safetensors(lens, tensors)
    (lens / "model.safetensors").rename(lens / SECOND)


def in_config(key: str, value) -> Callable[[Path, Path], None]:
    return lambda lens, _: edit_json(lens / "config.json", lambda c: c.update({key: value}))


def untied(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["proj_to_sam.0.weight"] = tensors["proj_to_sam.0.weight"][:-1]


def to_int(tensors: dict[str, np.ndarray]) -> None:
    tensors["conv_1d.bias"] = np.arange(len(tensors["conv_1d.bias"]), dtype=np.int64)


def two_spellings(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]


def empty(lens: Path, _: Path) -> None:
    shutil.rmtree(lens)
    lens.mkdir()


def no_weights(lens: Path, _: Path) -> None:
    for file in lens.glob("*.safetensors*"):
        file.unlink()


def cut(file: str, keep: float) -> Callable[[Path, Path], None]:
    def change(lens: Path, sam: Path) -> None:
        path = (lens if file != sam.name else sam.parent) / file
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])

    return change


def entry(**values) -> Callable[[Path, Path], None]:
    """Other values in the entry of one tensor of a header."""
    return lambda lens, _: edit_header(
        lens / FIRST, lambda header: header[a_name(lens, FIRST)].update(values)
    )


def twice(header: dict) -> str:
    text = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    return text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}"


def llama(lens: Path, _: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    (lens / "config.json").write_text(json.dumps(config))


BROKEN = {  # what is done to (lens/, sam2.pt), and what the line says
    "a missing shard": (lambda lens, _: (lens / SECOND).unlink(), f"{SECOND}: no such file"),
    "an index that names an absent file": (
        lambda lens, _: in_index(lens, {"ghost": "gone.safetensors"}),
        "gone.safetensors: no such file",
    ),
    "an index with a tensor that is nowhere": (
        lambda lens, _: in_index(lens, {"ghost": FIRST}),
        "missing tensor ghost",
    ),
    "an index without a map": (
        lambda lens, _: edit_json(lens / INDEX, lambda i: i.pop("weight_map")),
        f"{INDEX}: has no weight_map",
    ),
    "an index that is not JSON": (cut(INDEX, 0.5), f"{INDEX} is not JSON"),
    "a truncated file": (cut(SECOND, 0.9), f"{SECOND}: cut short"),
    "a truncated header": (cut(SECOND, 0.0005), f"{SECOND}: not a safetensors file"),
    "a header that is not JSON": (
        lambda lens, _: edit_header(lens / FIRST, lambda _: "{'a': 1}"),
        f"{FIRST}: not a safetensors file: broken header",
    ),
    "a header without offsets": (
        lambda lens, _: edit_header(lens / FIRST, lambda _: '{"a": {"dtype": "F32"}}'),
        f"{FIRST}: not a safetensors file: broken header",
    ),
    "a header that contradicts itself": (entry(shape=[1, 2, 3]), "bytes, F32 [1, 2, 3] needs 24"),
    "a type of eight bits": (entry(dtype="F8_E4M3"), "has the unsupported type F8_E4M3"),
    "one name twice in a file": (
        lambda lens, _: edit_header(lens / FIRST, twice), "is there twice"
    ),
    "one name in two shards": (doubled, f"{INDEX} places in {FIRST}"),
    "one tensor in two spellings": (
        lambda lens, _: rewrite(lens, two_spellings),
        "model.norm.weight is there in two spellings",
    ),
    "a wrong shape": (
        lambda lens, _: rewrite(lens, reshape), "misshapen tensor proj_to_sam.0.weight"
    ),
    "integers for weights": (
        lambda lens, _: rewrite(lens, to_int), "tensor conv_1d.bias is of type int64"
    ),
    "NaN": (holding(np.nan), "up_proj.weight holds NaN or infinite values"),
    "infinity in bfloat16": (
        holding(-np.inf, ml_dtypes.bfloat16), "up_proj.weight holds NaN or infinite values"
    ),
    "a tied flag that the file contradicts": (
        lambda lens, _: (rewrite(lens, untied), in_config("tie_word_embeddings", True)(lens, _)),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "an untied flag without a head": (
        lambda lens, _: (
            rewrite(lens, lambda tensors: tensors.pop("lm_head.weight", None)),
            in_config("tie_word_embeddings", False)(lens, _),
        ),
        "missing tensor lm_head.weight",
    ),
    "a foreign architecture": (llama, "config.json: "),
    "a configuration that is not JSON": (cut("config.json", 0.5), "config.json is not JSON"),
    "a configuration that is a list": (
        lambda lens, _: (lens / "config.json").write_text("[1]"), "expected a JSON object"
    ),
    "a configuration without a key": (
        lambda lens, _: edit_json(lens / "config.json", lambda c: c.pop("num_attention_heads")),
        "num_attention_heads",
    ),
    "a missing configuration": (
        lambda lens, _: (lens / "config.json").unlink(), "config.json: no such file"
    ),
    "a missing directory": (lambda lens, _: shutil.rmtree(lens), "config.json: no such file"),
    "an empty directory": (empty, "config.json: no such file"),
    "a directory without weights": (no_weights, "expected model.safetensors"),
    "a pickle with code": (
        lambda _, sam: torch.save({"model": {"x": Code()}}, sam), "sam2.pt: torch cannot load it"
    ),
    "a truncated torch file": (cut("sam2.pt", 0.5), "sam2.pt: torch cannot load it"),
    "a torch file of something else": (
        lambda _, sam: torch.save({"model": {"epoch": 3}}, sam), "epoch is not a tensor"
    ),
    "a configuration of SAM that contradicts itself": (
        lambda _, sam: edit_json(
            sam.parent / "sam2_config.json", lambda c: c["neck"].update(d_model=7)
        ),
        "sam2_config.json: ",
    ),
}  # fmt: skip


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused(whole, tmp_path, monkeypatch, capsys, what):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "in"
    shutil.copytree(whole / "lens", folder / "lens")
    shutil.copytree(whole / "sam", folder / "sam")
    destroy, text = BROKEN[what]
    destroy(folder / "lens", folder / "sam" / "sam2.pt")
    line = refused(
        capsys, "from_torch", "--lens", folder / "lens", "--sam", folder / "sam" / "sam2.pt",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert text in line and str(folder) in line
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def flip(ours: Path) -> None:
    file = max((p for p in (ours / "params").rglob("*") if p.is_file()), key=os.path.getsize)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def other_shapes(ours: Path) -> None:
    edit_json(ours / checkpoints.CONFIG, lambda c: c["sam"]["decoder"].update(mlp_dim=1024))
    checkpoints.write_manifest(ours)


BROKEN_OURS = {
    "a flipped bit": (flip, "is not what was written"),
    "no manifest": (lambda ours: (ours / "manifest.json").unlink(), "not written to its end"),
    "no configuration": (lambda ours: (ours / checkpoints.CONFIG).unlink(), "holds no lens_config"),
    "a configuration that is not JSON": (
        lambda ours: (ours / checkpoints.CONFIG).write_text("{"), "lens_config.json is not JSON"
    ),
    "an unknown position scheme": (
        lambda ours: (
            edit_json(ours / checkpoints.CONFIG, lambda c: c.update(context_positions="both")),
            checkpoints.write_manifest(ours),
        ),
        "'both' is none of mrope, text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_OURS)
def test_a_broken_checkpoint_of_ours_is_refused(converted, tmp_path, capsys, what):
    shutil.copytree(converted, tmp_path / "ours")
    destroy, text = BROKEN_OURS[what]
    destroy(tmp_path / "ours")
    for layout in ("lens", "hf"):
        options = ("--layout", layout, "--output", tmp_path / "out")
        line = refused(capsys, "to_torch", "--checkpoint", tmp_path / "ours", *options)
        assert text in line and str(tmp_path) in line
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_tensors_that_do_not_fit_the_configuration_are_named(converted, tmp_path, capsys):
    shutil.copytree(converted, tmp_path / "ours")
    other_shapes(tmp_path / "ours")
    options = ("--layout", "lens", "--output", str(tmp_path / "out"))
    assert main(["to_torch", "--checkpoint", str(tmp_path / "ours"), *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("misshapen tensor sam/sam_mask_decoder/transformer/layers/0/mlp" in x for x in lines)
    assert not (tmp_path / "out").exists()


def test_the_whole_one_is_not_refused(whole, tmp_path):
    """What is broken above is what was refused, and nothing else."""
    from_torch(tmp_path / "out", lens=whole / "lens", sam=whole / "sam" / "sam2.pt")
