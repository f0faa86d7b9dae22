"""Checkpoints of ours back to PyTorch: every round trip to the bit, and what transformers says."""

import json
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import transformers

from lens_jax import checkpoints
from lens_jax.convert_weights import from_torch, qwen_vl, sam2, to_torch
from lens_jax.convert_weights.__main__ import main
from lens_jax.convert_weights.reader import open_weights
from lens_jax.convert_weights.table import WeightsError
from lens_jax.convert_weights.writer import Spec, write_model
from lens_jax.model_configs.sam import read_sam2
from lens_jax.models.sam.config import PRESETS, Sam2Config
from tests import micro
from tests.golden import weights as golden
from tests.tools.test_convert_weights import (
    GOLDEN,
    assert_equal,
    files,  # noqa: F401 (a fixture)
    hugging_face_model,
    read,
)

torch = pytest.importorskip("torch")

BFLOAT16 = ml_dtypes.bfloat16
BF16_NAMES = ("model.layers.0.", "connector.blocks.1.", "sam.image_encoder.trunk.blocks.2.")


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    source = open_weights(path)
    return {name: np.array(source[name].load()) for name in source}


def run(command: str, **options) -> int:
    return main([command, *(f"--{name}={value}" for name, value in options.items())])


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """An official LENS directory; some tensors are bfloat16, the others float32."""
    tensors = {
        name: x.astype(BFLOAT16) if name.startswith(BF16_NAMES) else x
        for name, x in golden.lens_tensors(GOLDEN).items()
    }
    return golden.write_lens(GOLDEN, tmp_path_factory.mktemp("official") / "lens", tensors, 2)


@pytest.fixture(scope="module")
def checkpoint(official, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ours") / "lens"
    from_torch(output, lens=official)
    return output


def is_junk(name: str) -> bool:
    return name.startswith(("sam.memory_", "sam.maskmem_tpos_enc"))


# --- official LENS --------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_gb", [5.0, 0.004])
def test_official_to_ours_to_official(official, checkpoint, tmp_path, shard_gb):
    out = tmp_path / "lens"
    assert run("to_torch", checkpoint=checkpoint, layout="lens", output=out, shard_gb=shard_gb) == 0
    expected = {n: x for n, x in tensors_of(official).items() if not is_junk(n)}
    assert_equal(tensors_of(out), expected)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (official / "config.json").read_text()
    )
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        assert (out / name).read_bytes() == (official / name).read_bytes()
    shards = sorted(out.glob("*.safetensors"))
    if shard_gb > 1:
        assert [f.name for f in shards] == ["model.safetensors"]
    else:
        assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
        large = [f for f in shards if f.stat().st_size > shard_gb * 1e9 + 1e5]
        assert all(len(open_weights(f)) == 1 for f in large)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())

    from_torch(tmp_path / "again", lens=out)
    assert_equal(read(tmp_path / "again"), read(checkpoint))
    assert checkpoints.read_config(tmp_path / "again") == checkpoints.read_config(checkpoint)


def test_safetensors_reads_what_was_written(tmp_path):
    """The library's own reader, which checks offsets and lengths."""
    from safetensors import safe_open

    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(BFLOAT16),
        "b": rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(2, 0, 1),
        "c": np.float32(3.0),
        "d": np.zeros((0, 2), np.float16),
    }
    specs = [Spec(n, x.shape, x.dtype) for n, x in tensors.items()]
    write_model(tmp_path, specs, iter(tensors.values()), 1e9)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, x in tensors.items():
            theirs = file.get_tensor(name)
            np.testing.assert_array_equal(theirs.float().numpy(), np.asarray(x, np.float32))
            assert str(theirs.dtype) == f"torch.{x.dtype}"


def golden_sam() -> Sam2Config:
    config = json.loads((GOLDEN / "lens_tiny" / "sam2_config.json").read_text())
    return read_sam2(config)


def test_settings_come_back(checkpoint, tmp_path, capsys):
    """What no official file says travels in lens_config.json."""
    ours = tmp_path / "ours"
    shutil.copytree(checkpoint, ours)
    config = checkpoints.read_config(ours) | {"context_positions": "mrope", "max_new_tokens": 5}
    (ours / checkpoints.CONFIG).write_text(json.dumps(config))
    checkpoints.write_manifest(ours)
    assert run("to_torch", checkpoint=ours, layout="lens", output=tmp_path / "lens") == 0
    printed = capsys.readouterr().out
    assert "plain positions" in printed
    assert ("SAM 2 large" in printed) == (golden_sam() != PRESETS["large"])
    from_torch(tmp_path / "again", lens=tmp_path / "lens")
    assert checkpoints.read_config(tmp_path / "again") == config


# --- Hugging Face ---------------------------------------------------------------------------------

SAM = micro.CONFIG.sam


def hugging_face_sam(directory: Path, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """A Sam2Model as transformers saves it, with the tensors that the video model has besides."""
    torch.manual_seed(1)
    hf = transformers.Sam2Config.from_dict(sam2.write_hf(SAM))
    model = transformers.Sam2Model(hf).to(dtype)
    with torch.no_grad():
        for x in [*model.parameters(), model.prompt_encoder.shared_embedding.positional_embedding]:
            x.normal_()
        model.shared_image_embedding.positional_embedding.copy_(
            model.prompt_encoder.shared_embedding.positional_embedding
        )
    model.save_pretrained(directory)
    tensors = tensors_of(directory)
    kind = next(iter(tensors.values())).dtype
    for i, name in enumerate(sam2.CARRIED_NAMES):
        tensors[sam2.hf_source(SAM, name)[0]] = np.full((1, i + 2), i + 0.5, kind)
    golden.write_safetensors(directory, tensors)
    return tensors


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
@pytest.mark.parametrize(
    ("spelling", "tied", "dtype"),
    [("official", True, torch.bfloat16), ("new", False, torch.float32)],
)
def test_hugging_face_to_ours_to_hugging_face(tmp_path, family, spelling, tied, dtype):
    model = hugging_face_model(family, tied).to(dtype)
    model.save_pretrained(tmp_path / "mllm")
    tensors = {qwen_vl.official_name(n): x for n, x in tensors_of(tmp_path / "mllm").items()}
    if spelling == "new":
        new = {qwen_vl.official_name(name): name for name in model.state_dict()}
        golden.write_safetensors(tmp_path / "mllm", {new[name]: x for name, x in tensors.items()})
    sam = hugging_face_sam(tmp_path / "sam", dtype)
    from_torch(tmp_path / "ours", mllm=tmp_path / "mllm", sam=tmp_path / "sam", num_queries=4)
    out = tmp_path / "hf"
    assert run("to_torch", checkpoint=tmp_path / "ours", layout="hf", output=out) == 0
    assert_equal(tensors_of(out / "mllm"), tensors)
    assert_equal(tensors_of(out / "sam"), sam)

    for cls, folder in ((type(model), "mllm"), (transformers.Sam2Model, "sam")):
        loaded, info = cls.from_pretrained(out / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert loaded.dtype == dtype
        if folder == "mllm":
            for name, x in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[name], x), name

    again = tmp_path / "again"
    options = {"mllm": out / "mllm", "sam": out / "sam", "context": out / "context.safetensors"}
    assert run("from_torch", output=again, **options) == 0
    assert_equal(read(again), read(tmp_path / "ours"))
    ours, theirs = (checkpoints.read_config(tmp_path / name) for name in ("ours", "again"))
    assert {k: v for k, v in ours.items() if k != "mllm"} == {
        k: v for k, v in theirs.items() if k != "mllm"
    }

    # And by way of the official layout, whose config.json is flat.
    assert run("to_torch", checkpoint=again, layout="lens", output=tmp_path / "lens") == 0
    assert run("from_torch", lens=tmp_path / "lens", output=tmp_path / "third") == 0
    assert_equal(read(tmp_path / "third"), read(again))
    hf = json.loads((tmp_path / "lens" / "config.json").read_text())
    assert (hf["model_type"], hf["num_of_query"]) == ("qwen2_vl", 4)
    assert hf["rope_scaling"]["mrope_section"] == [1, 1, 2] and "text_config" not in hf


def test_official_to_hugging_face_and_back(official, checkpoint, tmp_path):
    out = tmp_path / "hf"
    assert run("to_torch", checkpoint=checkpoint, layout="hf", output=out) == 0
    for cls, folder in (
        (transformers.Qwen2_5_VLForConditionalGeneration, "mllm"),
        (transformers.Sam2Model, "sam"),
    ):
        _, info = cls.from_pretrained(out / folder, output_loading_info=True)
        assert not any(info.values()), info
    options = {"mllm": out / "mllm", "sam": out / "sam", "context": out / "context.safetensors"}
    assert run("from_torch", output=tmp_path / "again", **options) == 0
    assert_equal(read(tmp_path / "again"), read(checkpoint))


@pytest.mark.parametrize("config", [SAM, Sam2Config()])
def test_the_configuration_of_sam_is_invertible(config):
    assert sam2.read_hf(sam2.write_hf(config)) == config


def test_positions_of_sam_that_contradict_are_refused(tmp_path, capsys):
    tensors = hugging_face_sam(tmp_path / "sam", torch.float32)
    tensors[sam2.HF_MATRIX_AGAIN] = tensors[sam2.HF_MATRIX_AGAIN] + 1
    golden.write_safetensors(tmp_path / "sam", tensors)
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    assert run("from_torch", mllm=mllm, sam=tmp_path / "sam", output=tmp_path / "out") == 2
    assert "differs from prompt_encoder.shared_embedding" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [3, 5])
def test_stacked_embeddings_have_as_many_rows_as_there_are_labels(tmp_path, capsys, rows):
    tensors = hugging_face_sam(tmp_path / "sam", torch.float32)
    name = "prompt_encoder.point_embed.weight"
    tensors[name] = np.resize(tensors[name], (rows, SAM.d_model))
    golden.write_safetensors(tmp_path / "sam", tensors)
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    assert run("from_torch", mllm=mllm, sam=tmp_path / "sam", output=tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert f"unexpected tensor sam.{name} with shape [{rows}, {SAM.d_model}]" in printed
    assert "missing tensor sam.sam_prompt_encoder.point_embeddings.2.weight" in printed


# --- verify ---------------------------------------------------------------------------------------


def changed(directory: Path, output: Path, **tensors: np.ndarray | None) -> Path:
    """A copy with other tensors, or without those that are None."""
    shutil.copytree(directory, output)
    for file in output.glob("*.safetensors*"):
        file.unlink()
    kept = {n: x for n, x in (tensors_of(directory) | tensors).items() if x is not None}
    golden.write_safetensors(output, kept)
    return output


def test_verify_agrees(official, checkpoint, tmp_path, capsys):
    assert run("verify", checkpoint=checkpoint, torch=official) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all agree"
    mllm, sam = golden.write_mllm(GOLDEN, tmp_path / "m"), golden.write_sam(GOLDEN, tmp_path / "s")
    from_torch(tmp_path / "half", mllm=mllm, sam=sam, dtype="bfloat16")
    options = {"checkpoint": tmp_path / "half", "torch": mllm, "sam": sam}
    assert run("verify", **options, dtype="bfloat16") == 0
    assert run("verify", **options) == 1
    assert "is bfloat16 here, float32 there" in capsys.readouterr().out


def test_verify_names_what_differs_and_runs_both_models(official, checkpoint, tmp_path, capsys):
    tensors = tensors_of(official)
    name = "sam.sam_mask_decoder.iou_token.weight"
    touched = tensors[name].copy()
    touched[0, 3] += 5
    other = changed(
        official,
        tmp_path / "other",
        **{name: touched, "sam.no_obj_ptr": None, "sam.obj_ptr_tpos_proj.bias": np.ones(3, "f4")},
    )
    assert run("verify", checkpoint=checkpoint, torch=other, forward=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"differs: {name} differs in 1 of {touched.size} values, by up to 5" in lines
    assert f"differs: sam.no_obj_ptr is only in {checkpoint}" in lines
    # Only the masks depend on what was changed.
    assert [line for line in lines if line.startswith("differs: mask logits differ by ")]
    assert lines[-1] == f"{sum(line.startswith('differs: ') for line in lines)} differences"
    assert not any(f"differs: {what}" in line for what in ("logits", "SAM's") for line in lines)


def test_verify_refuses_what_it_cannot_read(official, checkpoint, tmp_path, capsys):
    assert run("verify", checkpoint=checkpoint, torch=tmp_path / "nowhere") == 2
    assert run("verify", checkpoint=tmp_path / "nowhere", torch=official) == 2
    assert run("verify", checkpoint=official, torch=official) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 3 and "nowhere" in errors[0] and "nowhere" in errors[1]


def test_help_says_what_forward_compares(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    shown = capsys.readouterr().out
    for text in ("--forward", "the mask decoder's low-resolution logits", "0.001", "--torch"):
        assert " ".join(text.split()) in " ".join(shown.split())
    with pytest.raises(SystemExit):
        main(["to_torch", "--help"])
    assert "--shard_gb" in capsys.readouterr().out


# --- interrupted ----------------------------------------------------------------------------------

# Imports once, then forks conversions and kills them; a delay is a fraction of a whole run.
KILLER = """
    import os, signal, sys, time
    from pathlib import Path
    from lens_jax.convert_weights import (from_torch, to_torch)

    command, source, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])

    def start(output):
        pid = os.fork()
        if pid:
            return pid
        if command == "from_torch":
            from_torch(output, lens=source)
        else:
            to_torch(source, command, output)
        os._exit(0)

    begin = time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    whole = time.monotonic() - begin
    for i, fraction in enumerate(map(float, sys.argv[4:])):
        pid = start(folder / f"killed{i}")
        time.sleep(fraction * whole)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


@pytest.mark.parametrize("command", ["from_torch", "lens", "hf"])
def test_killed_at_any_moment_nothing_half_made_loads(official, checkpoint, tmp_path, command):
    fractions = [random.Random(command).uniform(0.2, 1.0) for _ in range(6)]
    source = official if command == "from_torch" else checkpoint
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), command, source, tmp_path,
         *map(str, fractions)],
        check=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    whole = load(command, tmp_path / "whole")
    survivors = [p for p in tmp_path.iterdir() if p.name != "whole"]
    for path in survivors:
        try:
            found = load(command, path)
        except (WeightsError, checkpoints.CheckpointError, OSError):
            assert path.name.startswith("."), f"{path} is there, and is not whole"
            continue
        assert_equal(found, whole)


def load(command: str, directory: Path) -> dict[str, np.ndarray]:
    """Everything in what a conversion wrote, as its readers find it."""
    if command == "from_torch":
        return read(directory)
    if command == "lens":
        json.loads((directory / "config.json").read_text())
        return tensors_of(directory)
    for folder in ("mllm", "sam"):
        json.loads((directory / folder / "config.json").read_text())
    return {
        f"{part}:{name}": x
        for part in ("mllm", "sam", "context.safetensors")
        for name, x in tensors_of(directory / part).items()
    }


def test_an_interrupt_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    import lens_jax.convert_weights.export as export

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_torch(checkpoint, "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
