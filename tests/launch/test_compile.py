"""launch/compile.py on a small model: what it reports, and what XLA makes of the run's programs."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.common import SIZES
from lens_jax import config as configs
from lens_jax.aot import compiling, hlo, run_models, run_programs, tpu
from lens_jax.aot import shapes as aot_shapes
from lens_jax.commands import compile as command
from lens_jax.distribution import sharding
from lens_jax.model_configs.qwen_vl import write_qwen_vl
from lens_jax.model_configs.sam import write_sam
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.qwen_vl.config import PRESETS
from lens_jax.models.sam.config import PRESETS as SAM2
from lens_jax.training import programs
from tests.tpu import devices

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("lens_*.yaml"))
CHIPS = 4
ROWS, GROUP, TOKENS = 8, 2, 64

RUN = {
    "data.data_dir": "data",
    "data.prompt_tokens": "[128]",
    "data.windows": "[4]",
    "data.canvas": "[[64, 64]]",
    "data.eval_batch_size": ROWS,
    "alignment.steps": 1,
    "alignment.batch_size": ROWS,
    "grpo.steps": 1,
    "grpo.batch_size": ROWS,
    "grpo.per_device_batch_size": 1,
    "grpo.num_generations": GROUP,
    "rollout.max_new_tokens": TOKENS,
    "remat": "full",
}


@pytest.fixture(scope="module")
def shapes() -> LensConfig:
    """Large enough that matrices are cut, with few different layers."""
    size = SIZES["small"]
    sam = dataclasses.replace(size.sam, image_size=128, stages=(1, 1, 1, 1), global_att_blocks=(2,))
    return LensConfig(size.qwen, sam, num_queries=8)


@pytest.fixture(scope="module")
def compiled(shapes, tmp_path_factory) -> tuple[dict, Path]:
    """The report on four chips, and the folder of the programs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, XLA's compiler for TPU, is not installed: pip install libtpu")
    root = tmp_path_factory.mktemp("compile")
    (root / "mllm").mkdir()
    (root / "mllm" / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_vl"} | write_qwen_vl(SIZES["small"].qwen))
    )
    (root / "sam2_config.json").write_text(json.dumps(write_sam(shapes.sam)))
    run = RUN | {"model.mllm": root / "mllm", "model.sam": root / "sam2.pt", "model.num_queries": 8}
    (root / "run.yaml").write_text("precision: bfloat16\n")
    argv = ["--config", root / "run.yaml", "--topology", "v5e:2x2", "--stage", "grpo"]
    argv += ["--output", root / "report.json", "--hlo_dir", root]
    argv += [x for key, value in run.items() for x in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "compile.py", *map(str, argv)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((root / "report.json").read_text())
    assert all(program["name"] in done.stdout for program in report["programs"])
    return report, root


def module(compiled, name: str) -> hlo.Module:
    return hlo.Module((compiled[1] / f"{name}.txt").read_text())


def policy_bytes(shapes: LensConfig, itemsize: int) -> int:
    model = abstract(shapes)
    leaves = jax.tree.leaves([nnx.state(model.visual), nnx.state(model.language)])
    return itemsize * sum(math.prod(x.shape) for x in leaves)


@pytest.mark.compiled
def test_report(compiled):
    report, _ = compiled
    assert (report["topology"], report["chips"], report["fits"]) == ("v5e:2x2", CHIPS, True)
    assert report["mesh"] == {"data": 1, "fsdp": CHIPS, "tensor": 1}
    names = [program["name"] for program in report["programs"]]
    assert names == ["grpo.relayout", "grpo.rollout", f"grpo.update[{TOKENS}]"]
    for program in report["programs"]:
        assert program["fits"] and program["hbm_limit"] == tpu.CHIPS["v5e"].memory
        assert program["hbm_bytes_per_chip"] <= program["resident_bytes_per_chip"]
        assert program["resident_bytes_per_chip"] == sum(program["resident"].values())
        assert program["traffic_bytes_per_chip"] > 0 and program["compile_seconds"] > 0
        assert 0 <= program["model_flops_utilisation_bound"] <= 1
    flops = {program["name"]: program["flops_per_chip"] for program in report["programs"]}
    assert flops["grpo.relayout"] == 0 < flops["grpo.rollout"] < flops[f"grpo.update[{TOKENS}]"]


@pytest.mark.compiled
def test_what_lies_on_a_chip(compiled, shapes):
    """Parameters and moments in parts, the reference too, the copy for sampling whole."""
    _, rollout, update = compiled[0]["programs"]
    share = policy_bytes(shapes, 2) / CHIPS
    assert share < update["resident"]["reference"] < 2 * share  # small parameters are whole
    trained = update["resident"]["parameters"]
    assert update["resident"]["moments"] == pytest.approx(2 * trained, rel=1e-3)
    assert rollout["resident"]["sampling copy"] == policy_bytes(shapes, 2)
    assert "sampling copy" not in update["resident"]
    for name in ("parameters", "moments", "reference", "next batch"):
        assert rollout["resident"][name] == update["resident"][name]
    mllm, rows = shapes.mllm, ROWS // CHIPS
    tokens = 128 + GROUP * TOKENS
    per_token = 2 * 2 * mllm.num_layers * mllm.num_kv_heads * mllm.head_dim
    assert rollout["resident"]["caches"] == rows * tokens * per_token


@pytest.mark.compiled
def test_every_parameter_lies_there_once(shapes):
    """Beside a re-layout, too, which reads trained and frozen ones."""
    run = RUN | {"model.mllm": "x", "model.sam": "x", "grpo.trained": "[visual, context]"}
    config = configs.load([str(x) for key, value in run.items() for x in (f"--{key}", value)])
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    options = dict(stages=["grpo"], read_text=None, end_tokens=(1,), repetition_penalty=1.0)
    relayout = next(run_programs.list_programs(config, shapes, mesh, **options))
    held = [relayout.named["parameters"]]
    held += [relayout.beside[name] for name in ("parameters", "frozen")]
    leaves = jax.tree.leaves(nnx.state(abstract(shapes)))
    whole = 4 * sum(math.prod(x.shape) for x in leaves)
    assert aot_shapes.bytes_per_chip(held) == pytest.approx(whole, rel=1e-6)  # constants besides


@pytest.mark.compiled
def test_relayout_gathers_once(compiled, shapes):
    """In 16 bits: the conversion comes before the way."""
    relayout = compiled[0]["programs"][0]
    assert set(relayout["collectives"]) == {"all-gather"}
    assert relayout["collective_bytes_per_chip"] <= policy_bytes(shapes, 2)
    assert relayout["collective_bytes_per_chip"] > 0.8 * policy_bytes(shapes, 2)


@pytest.mark.compiled
def test_sampling_needs_no_other_chip(compiled):
    assert module(compiled, "grpo.rollout").collectives() == []


@pytest.mark.compiled
def test_update_gathers_layer_by_layer(compiled, shapes):
    """No program ever holds all layers of a matrix."""
    program = module(compiled, f"grpo.update[{TOKENS}]")
    mllm = shapes.mllm
    whole = {
        (layers, *sorted(pair))
        for layers, pair in [
            (mllm.num_layers, (mllm.hidden_size, mllm.intermediate_size)),
            (mllm.num_layers, (mllm.hidden_size, mllm.hidden_size)),
        ]
    }
    found = {
        (int(sizes[0]), *sorted(map(int, sizes[1:])))
        for instruction in program.instructions()
        for shape in re.findall(r"\w+\[([\d,]+)\]", instruction.shape)
        if len(sizes := shape.split(",")) == 3
    }
    assert found and not whole & found


@pytest.mark.compiled
def test_update_moves_weights_and_gradients_alone(compiled, shapes):
    """For each portion those that train at most twice, the others once, the gradients in parts."""
    _, _, update = compiled[0]["programs"]
    model = abstract(shapes)

    def cut(*parts) -> int:
        sizes = (math.prod(x.shape) for x in jax.tree.leaves([nnx.state(part) for part in parts]))
        return 2 * sum(size for size in sizes if size >= sharding.MIN_SHARDED_ELEMENTS)

    policy, portions = cut(model.visual, model.language), ROWS // CHIPS
    decoder = model.sam.sam_mask_decoder, model.sam.sam_prompt_encoder
    trained, frozen = policy + cut(model.context, *decoder), policy + cut(model.sam.image_encoder)
    moved = update["collectives"]
    # The rest: parameters that are not cut, sums of metrics, and the vocabulary's gradient.
    assert moved.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert 0.8 * portions * trained < moved["reduce-scatter"] < 1.05 * portions * trained
    gathers = portions * (2 * trained + frozen)
    assert 0.5 * gathers < moved["all-gather"] < 1.05 * gathers
    assert update["collective_bytes_per_chip"] < 1.2 * (gathers + portions * trained)


@pytest.mark.nightly
def test_evaluation(shapes):
    """It reads a whole copy beside the parameters; nobody waits for another chip's rows."""
    run = RUN | {"model.mllm": "Qwen2.5-VL-3B-Instruct", "model.sam": "sam2_hiera_large.pt"}
    argv = [str(x) for key, value in run.items() for x in (f"--{key}", value)]
    config = configs.load([*argv, "--precision", "bfloat16"])
    mesh = sharding.make_mesh(config.mesh, devices())
    options = dict(stages=["evaluation"], read_text=None, end_tokens=(1,), repetition_penalty=1.05)
    rows = {}
    with programs.precision(config):
        official = dataclasses.replace(shapes, context_positions="text")
        listed = [x.name for x in run_programs.list_programs(config, official, mesh, **options)]
        assert listed == [f"evaluation.{x}" for x in ("relayout", "write", "read", "draw")]
        for program in run_programs.list_programs(config, shapes, mesh, **options):
            row, _ = compiling.compile_program(program, mesh, tpu.CHIPS["v5e"])
            assert row.fits and min(row.resident.values()) >= 0
            rows[program.name.removeprefix("evaluation.")] = row
    assert [*rows] == ["relayout", "write", "draw"]
    leaves = jax.tree.leaves(nnx.state(abstract(shapes)))
    whole = 2 * sum(math.prod(x.shape) for x in leaves)
    gathered = rows["relayout"].collectives
    assert set(gathered) == {"all-gather"} and 0.7 * whole < gathered["all-gather"] <= whole
    for name in ("write", "draw"):
        assert rows[name].resident["sampling copy"] == whole
        assert 0 < rows[name].resident["parameters"] < whole
        assert rows[name].collective_bytes_per_chip < 1e-3 * whole  # whether all have ended
    assert rows["write"].resident["caches"] > 0


@pytest.mark.compiled
def test_what_does_not_fit_says_what_to_change():
    (chip, *_) = devices()
    place = jax.sharding.SingleDeviceSharding(chip)
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=[chip])

    def compile_for(gib, **options):
        x = jax.ShapeDtypeStruct((gib, 2**28), jnp.float32, sharding=place)
        program = run_programs.Program(
            "grpo.update", jax.jit(lambda x: jnp.sort(x, axis=0)), (x,), {"x": x}, {}
        )
        return compiling.compile_program(program, mesh, tpu.CHIPS["v5e"], **options)

    row, text = compile_for(40)
    assert not row.fits and text is None and row.hbm_bytes_per_chip > 4e10
    assert row.compile_seconds > 0
    row, text = compile_for(40, hopeless=False)
    assert not row.fits and text is None and row.resident == {"x": 40 * 2**30, "caches": 0}
    assert "without temporaries" in row.error and row.compile_seconds == 0
    row, text = compile_for(12)  # and a copy
    assert not row.fits and text is None and row.hbm_bytes_per_chip > 20 * 2**30
    assert row.resident["temporaries"] > 8 * 2**30 and row.compile_seconds > 0
    config = configs.RunConfig(grpo=configs.GRPOConfig(steps=1, batch_size=8))
    first, second, *_ = compiling.suggestions(config, mesh, "grpo.update")
    assert (first, second) == ("--grpo.per_device_batch_size 4", "--remat full")
    first, *_ = compiling.suggestions(config, mesh, "evaluation.draw")
    assert first == "--data.eval_batch_size 16"


def test_the_smallest_slice_that_fits(monkeypatch, capsys):
    """Through the slices of a kind, one that does not divide included."""
    tried = []

    def compile_run(config, topology, stages, *, quick):
        tried.append(topology)
        if topology == "v5e:2x4":
            raise configs.ConfigError("8 rows over 3")
        row = {"resident_bytes_per_chip": 12e9}
        return {"fits": topology == "v5e:4x4", "chips": 16, "programs": [row, row]}

    monkeypatch.setattr(command, "compile_run", compile_run)
    report = command.smallest(Path("a.yaml"), configs.RunConfig(), "v5e", ["grpo"])
    assert report["fits"] and tried == ["v5e:2x2", "v5e:2x4", "v5e:4x4"]
    refusal, found = capsys.readouterr().out.splitlines()
    assert refusal == "a.yaml: v5e:2x4: 8 rows over 3"
    assert found == "a.yaml: v5e:4x4 (16 chips) is the smallest that fits, 12.0 GB on a chip"
    assert command.smallest(Path("a.yaml"), configs.RunConfig(), "v5p", ["grpo"]) is None
    assert capsys.readouterr().out == "a.yaml: fits no slice of v5p\n"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes(file):
    """Each loads, names models whose shapes are known, and is the published recipe."""
    config = configs.load(["--config", str(file)])
    shapes = run_models.model_shapes(config)
    assert shapes.sam == SAM2["large"]
    size = "Qwen2.5-VL-3B-Instruct" if "_3b_" in file.stem else "Qwen2-VL-2B-Instruct"
    assert shapes.mllm == PRESETS[size]
    stage, samples, epochs = config.grpo, 126_908, 8
    if "stage1" in file.stem:
        stage, epochs = config.alignment, 25
    if "reasonseg" in file.stem:
        samples, epochs = 239, 40
    assert stage.steps == pytest.approx(epochs * samples / stage.batch_size, abs=1)
    assert (config.alignment.steps, config.grpo.steps).count(0) == 1
    assert config.data.reasoning == bool(config.rewards.format) == ("reasoning" in file.stem)


def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    recipe = ["--config", str(RECIPES[0])]

    def refused(*argv) -> str:
        assert command.main([str(x) for x in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "give one of --topology and --suggest" in refused(*recipe)
    assert "v7:4x4 is no slice: give a chip (v5e, v5p, v6e)" in refused(
        *recipe, "--topology", "v7:4x4"
    )
    assert "give --config" in refused("--topology", "v5e:4x4")
    assert "--slices: expected a whole number of at least 1, got 0" in refused(
        *recipe, "--topology", "v5e:4x4", "--slices", 0
    )
    assert "has no step of alignment" in refused(
        *recipe, "--topology", "v5e:4x4", "--stage", "alignment"
    )
    assert "--suggest prints" in refused("--suggest", "v5e", "--output", tmp_path / "x.json")
    assert "--suggest knows v5e, v5p, v6e" in refused(*recipe, "--suggest", "v4")
    unknown = [*recipe, "--model.mllm", tmp_path / "Qwen9", "--topology", "v5e:4x4"]
    assert "Qwen9/config.json does not exist" in refused(*unknown)
    unknown = [*recipe, "--model.sam", tmp_path / "sam9.pt", "--topology", "v5e:4x4"]
    assert "holds no sam2_config.json" in refused(*unknown)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "libtpu" in refused(*recipe, "--topology", "v5e:4x4")
