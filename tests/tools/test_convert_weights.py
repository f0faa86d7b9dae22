"""Official weights in every layout they come in, to checkpoints of ours."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from lens_jax import checkpoints
from lens_jax.convert_weights import (
    WeightsError,
    from_torch,
    lens_table,
    load_lens_state,
    parameter_shapes,
    qwen_vl,
    sam2,
)
from lens_jax.convert_weights import table as tables
from lens_jax.convert_weights.__main__ import main
from lens_jax.convert_weights.reader import open_weights
from lens_jax.model_configs.lens import read_lens
from lens_jax.model_configs.sam import read_sam2, write_sam
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.sam.config import PRESETS
from tests import qwen2_vl
from tests.golden import weights as golden

torch = pytest.importorskip("torch")

GOLDEN = Path(os.environ.get("LENS_GOLDEN_DIR", Path(__file__).parents[1] / "golden" / "data"))


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    return golden.build(GOLDEN)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The golden recipe on disk: lens/ (sharded), mllm/, sam/ (torch)."""
    root = tmp_path_factory.mktemp("official")
    golden.write_lens(GOLDEN, root / "lens", shards=3)
    golden.write_mllm(GOLDEN, root / "mllm")
    golden.write_sam(GOLDEN, root / "sam", "pt")
    return root


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory) -> Path:
    """The official LENS checkpoint of the golden recipe, converted."""
    output = tmp_path_factory.mktemp("converted") / "lens"
    assert main(["from_torch", "--lens", str(files / "lens"), "--output", str(output)]) == 0
    return output


def read(directory: Path) -> dict[str, np.ndarray]:
    return dict(checkpoints.iterate_params(directory))


def lens_config(directory: Path) -> LensConfig:
    return read_lens(checkpoints.read_config(directory))


def official_from(params: dict[str, np.ndarray], config: LensConfig) -> dict[str, np.ndarray]:
    """A converted checkpoint back under official names, through the inverse of the table."""
    table = lens_table(config)
    tensors = {
        e.source: e.transform.inverse(params[e.target]) for e in table.entries if e.target in params
    }
    unused = {n for n in params if n.startswith(tables.UNUSED)}
    return tensors | {n.removeprefix(tables.UNUSED).replace("/", "."): params[n] for n in unused}


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, shapes, types and bits."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (x.shape, x.dtype), name
        np.testing.assert_array_equal(
            np.ascontiguousarray(actual[name]).view(np.uint8),
            np.ascontiguousarray(x).view(np.uint8),
            err_msg=name,
        )


# --- table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "shape", "target"),
    [
        (tables.IDENTITY, (3, 4), (3, 4)),
        (tables.LINEAR, (3, 4), (4, 3)),
        (tables.CONV1D, (3, 4, 5), (5, 4, 3)),
        (tables.CONV2D, (3, 4, 5, 6), (5, 6, 4, 3)),
        (tables.CONV_TRANSPOSE2D, (3, 4, 5, 6), (5, 6, 3, 4)),
        (tables.CHANNELS_LAST, (2, 3, 4, 5), (2, 4, 5, 3)),
        (tables.SQUEEZE, (1, 4, 5), (4, 5)),
        (tables.chain(tables.CHANNELS_LAST, tables.SQUEEZE), (1, 3, 4, 5), (4, 5, 3)),
        (tables.flattened_conv(3, 2, 14, 14), (5, 3, 2, 14, 14), (1176, 5)),
    ],
    ids=lambda value: value.name if isinstance(value, tables.Transform) else "",
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_transform_is_undone_by_its_inverse(transform, shape, target, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    y = transform.forward(x)
    assert y.shape == target == transform.target_shape(shape)
    assert transform.source_shape(target) == shape
    assert_equal({"x": transform.inverse(y)}, {"x": x})


def test_layouts_compute_what_pytorch_computes():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    conv, patches = draw(4, 3, 2, 6, 6), draw(5, 3, 2, 6, 6)
    theirs = torch.nn.functional.conv3d(torch.tensor(patches), torch.tensor(conv), stride=(2, 6, 6))
    ours = patches.reshape(5, -1) @ tables.flattened_conv(3, 2, 6, 6).forward(conv)
    np.testing.assert_allclose(ours, theirs.reshape(5, 4).numpy(), rtol=1e-4, atol=1e-5)

    conv, x = draw(4, 3, 7), draw(2, 3, 7)
    theirs = torch.nn.functional.conv1d(torch.tensor(x), torch.tensor(conv))
    ours = np.einsum("bim,mio->bo", x, tables.CONV1D.forward(conv))
    np.testing.assert_allclose(ours, theirs[..., 0].numpy(), rtol=1e-4, atol=1e-5)

    linear, x = draw(4, 3), draw(2, 3)
    theirs = torch.nn.functional.linear(torch.tensor(x), torch.tensor(linear))
    np.testing.assert_allclose(x @ tables.LINEAR.forward(linear), theirs, rtol=1e-4, atol=1e-5)


def test_a_transform_refuses_what_does_not_fit():
    assert tables.LINEAR.target_shape((3,)) is None
    assert tables.SQUEEZE.target_shape((2, 3)) is None
    assert tables.flattened_conv(3, 2, 14, 14).target_shape((5, 3, 14, 14)) is None


def test_all_errors_come_at_once():
    table = tables.Table(
        (tables.Entry("a", "x/a", tables.LINEAR), tables.Entry("b", "x/b"), tables.Entry("c", "c")),
        carried=(r"spare\..+",),
        junk=(r"memory\..+",),
    )
    sources = {"a": (2, 3), "b": (4,), "d": (1,), "spare.x": (1,), "memory.y": (1,)}
    with pytest.raises(WeightsError) as caught:
        tables.make_plan(table, sources, {"x/a": (4, 2), "x/b": (4,), "c": (1,)}, "file")
    assert caught.value.errors == [
        "file: misshapen tensor a: shape [2, 3], the configuration asks for [2, 4]",
        "file: unexpected tensor d with shape [1]",
        "file: missing tensor c",
    ]
    plan = tables.make_plan(
        table,
        {"a": (2, 4), "b": (4,), "c": (1,), "spare.x": (1,), "memory.y": (1,)},
        {"x/a": (4, 2), "x/b": (4,), "c": (1,)},
        "file",
    )
    assert plan.junk == ("memory.y",)
    assert [e.target for e in plan.entries] == ["x/a", "x/b", "c", "unused/spare/x"]


@pytest.mark.compiled
@pytest.mark.parametrize("size", ["tiny", "large"])
def test_the_table_covers_published_sizes(size):
    """Shapes of LENS-3B: one entry for every parameter, none left over."""
    text = dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151936,
        rope_theta=1e6,
        rope_scaling={"mrope_section": [16, 24, 24]},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        image_token_id=151655,
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=2048,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    config = read_lens({"mllm": text | {"vision_config": vision}, "sam": write_sam(PRESETS[size])})
    table, shapes = lens_table(config), parameter_shapes(config)
    sources = {e.source: e.transform.source_shape(shapes[e.target]) for e in table.entries}
    plan = tables.make_plan(table, sources, shapes, "LENS")
    assert len(plan.entries) == len(shapes)
    assert sources["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert sources["conv_1d.weight"] == (2048, 2048, 64)
    sizes = {n: np.prod(s) for n, s in shapes.items() if n.startswith("context/")}
    assert round((sum(sizes.values()) - sizes["context/queries"]) / 1e6, 1) == 474.7


# --- reader ---------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "a": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "b.c": rng.standard_normal((2, 1, 4)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "count": np.array(3, np.int64),
        "empty": np.zeros((0, 2), np.float32),
    }


@pytest.mark.parametrize("shards", [1, 2])
def test_safetensors_keep_their_bits(tmp_path, mixed, shards):
    golden.write_safetensors(tmp_path, mixed, shards)
    source = open_weights(tmp_path)
    assert source.shapes == {name: x.shape for name, x in mixed.items()}
    assert_equal({name: source[name].load() for name in source}, mixed)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_keep_their_bits(tmp_path, mixed, wrap, zipped):
    tensors = {
        name: torch.tensor(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.tensor(x)
        for name, x in mixed.items()
    }
    state = tensors if wrap is None else {wrap: tensors, "step": 3}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    source = open_weights(tmp_path / "x.pt")
    assert_equal({name: source[name].load() for name in source}, mixed)


def test_sharded_torch_files_are_read(tmp_path, mixed):
    del mixed["a"]
    names = list(mixed)
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        part = {n: torch.tensor(mixed[n]) for n in names if weight_map[n] == file}
        torch.save(part, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_weights(tmp_path)
    assert_equal({name: source[name].load() for name in source}, mixed)


def test_code_in_a_torch_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="torch cannot load it"):
        open_weights(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_broken_files_are_named(tmp_path, mixed):
    golden.write_safetensors(tmp_path, mixed)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(WeightsError, match=r"model\.safetensors: cut short: \d+ bytes instead of"):
        open_weights(tmp_path)
    file.write_bytes(whole[:6])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a safetensors file"):
        open_weights(file)
    file.write_bytes((5).to_bytes(8, "little") + b"[1, 2" + whole)
    with pytest.raises(WeightsError, match="broken header"):
        open_weights(file)
    with pytest.raises(WeightsError, match="no such file"):
        open_weights(tmp_path / "nothing.pt")


def test_an_index_must_agree_with_its_shards(tmp_path, mixed):
    golden.write_safetensors(tmp_path, mixed, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["gone"] = content["weight_map"]["a"]
    del content["weight_map"]["half"]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError) as caught:
        open_weights(tmp_path)
    assert any("missing tensor gone" in e for e in caught.value.errors)
    assert any("half is not in model.safetensors.index.json" in e for e in caught.value.errors)
    content["weight_map"]["gone"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="not a plain file name"):
        open_weights(tmp_path)


# --- an official LENS checkpoint ------------------------------------------------------------------


def test_lens_round_trip_is_bit_exact(converted, official):
    assert_equal(official_from(read(converted), lens_config(converted)), official)


def test_the_produced_tree_is_the_model(converted):
    config, params = checkpoints.load_pretrained(converted)
    params.pop("unused")
    state = nnx.to_pure_dict(nnx.state(abstract(read_lens(config))))
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
    assert jax.tree.structure(params) == jax.tree.structure(state)
    assert shapes(params) == shapes(state)


def test_tensors_land_where_they_belong(converted, official):
    params = read(converted)
    np.testing.assert_array_equal(
        params["language/layers/1/q_proj/kernel"],
        official["model.layers.1.self_attn.q_proj.weight"].T,
    )
    np.testing.assert_array_equal(params["context/queries"], official["learnable_query"][0])
    np.testing.assert_array_equal(
        params["context/conv/kernel"][2], official["conv_1d.weight"][:, :, 2].T
    )
    np.testing.assert_array_equal(
        params["visual/blocks/1/gate_proj/bias"], official["visual.blocks.1.mlp.gate_proj.bias"]
    )
    np.testing.assert_array_equal(params["unused/sam/no_obj_ptr"], official["sam.no_obj_ptr"])


def test_lens_config_says_what_inference_needs(converted, official):
    config = checkpoints.read_config(converted)
    source = GOLDEN / "lens_tiny"
    assert config["context_positions"] == "text"
    assert config["coordinates"] == "qwen2p5vl"
    assert config["num_queries"] == official["learnable_query"].shape[1]
    assert config["mllm"] == json.loads((source / "config.json").read_text())
    expected = read_sam2(json.loads((source / "sam2_config.json").read_text()))
    assert read_sam2(config["sam"]) == expected
    assert "{question}" in config["prompts"]["question"]
    for name in ("tokenizer.json", "generation_config.json", "preprocessor_config.json"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()


def test_a_full_disk_is_one_line(files, tmp_path, capsys, monkeypatch):
    """Orbax wraps the system's error in one of its own."""
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("x: No space left on device"),
    ):

        def refuse(*args, error=error):
            raise error

        monkeypatch.setattr(checkpoints.pretrained, "_write_params", refuse)
        assert main(["from_torch", f"--lens={files / 'lens'}", f"--output={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith(f"error: {tmp_path / 'out'}: the disk is full: make room")
        assert len(said) == 1 and not list(tmp_path.iterdir())


def test_junk_is_listed_and_dropped(files, tmp_path, capsys):
    assert main(["from_torch", f"--lens={files / 'lens'}", f"--output={tmp_path / 'out'}"]) == 0
    junk = golden.recipe(GOLDEN)["ignored_in_real_checkpoints"]["lens_stage2"]
    printed = capsys.readouterr().out.splitlines()
    assert {line.removeprefix("dropped ") for line in printed if line.startswith("dropped")} == set(
        junk
    )


def test_a_stage_1_checkpoint_takes_sam_from_its_own_file(files, official, tmp_path):
    untrained = {n: x + 1 if n.startswith("sam.") else x for n, x in official.items()}
    golden.write_lens(GOLDEN, tmp_path / "stage1", untrained)
    conversion = from_torch(tmp_path / "out", lens=tmp_path / "stage1", sam=files / "sam/sam2.pt")
    assert_equal(official_from(read(tmp_path / "out"), lens_config(tmp_path / "out")), official)
    assert {n for n in official if n.startswith("sam.")} <= set(conversion.dropped)
    assert checkpoints.read_config(tmp_path / "out")["context_positions"] == "text"


def test_load_lens_state_is_what_a_checkpoint_holds(converted, official):
    config, params = checkpoints.load_pretrained(converted)
    params.pop("unused")
    state = load_lens_state(official, read_lens(config))
    jax.tree.map(np.testing.assert_array_equal, state, params)
    head = {"lm_head.weight": official["model.embed_tokens.weight"]}
    jax.tree.map(
        np.testing.assert_array_equal,
        load_lens_state(head | official, read_lens(config)),
        params,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(files, tmp_path, official, dtype):
    from_torch(tmp_path / "out", lens=files / "lens", dtype=dtype)
    back = official_from(read(tmp_path / "out"), lens_config(tmp_path / "out"))
    assert_equal(back, {n: x.astype(dtype) for n, x in official.items()})


def test_bfloat16_is_kept(tmp_path, official):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in official.items()}
    golden.write_lens(GOLDEN, tmp_path / "lens", tensors)
    from_torch(tmp_path / "out", lens=tmp_path / "lens")
    assert_equal(official_from(read(tmp_path / "out"), lens_config(tmp_path / "out")), tensors)


# --- a new LENS from its parents ------------------------------------------------------------------


def test_parents_meet_with_a_fresh_context_module(files, tmp_path, official):
    run = lambda name, **options: from_torch(  # noqa: E731
        tmp_path / name, mllm=files / "mllm", sam=files / "sam/sam2.pt", **options
    )
    run("a", num_queries=5, seed=1)
    config = checkpoints.read_config(tmp_path / "a")
    assert (config["num_queries"], config["context_positions"]) == (5, "mrope")
    params = read(tmp_path / "a")
    back = official_from(params, lens_config(tmp_path / "a"))
    parents = {n: x for n, x in official.items() if n.startswith(("sam.", *qwen_vl.PREFIXES))}
    assert_equal({n: x for n, x in back.items() if n in parents}, parents)

    context = {n: x for n, x in params.items() if n.startswith("context/")}
    for name, x in context.items():
        if name.endswith("scale"):
            assert (x == 1).all(), name
        elif name.endswith(("bias", "pos_embed")):
            assert (x == 0).all(), name
        else:
            assert abs(x.std() - 0.02) < 0.003 and abs(x.mean()) < 0.003, name
    blocks = [context[f"context/blocks/{i}/qkv/kernel"] for i in range(2)]
    assert not np.array_equal(*blocks)

    run("again", num_queries=5, seed=1)
    assert_equal(read(tmp_path / "again"), params)
    run("other", num_queries=5, seed=2)
    assert not np.array_equal(
        read(tmp_path / "other")["context/queries"], params["context/queries"]
    )


def test_the_default_is_64_queries(files, tmp_path):
    from_torch(tmp_path / "out", mllm=files / "mllm", sam=files / "sam")
    assert checkpoints.read_config(tmp_path / "out")["num_queries"] == 64
    assert read(tmp_path / "out")["context/conv/kernel"].shape[0] == 64


def hugging_face_model(family: str, tied: bool) -> transformers.PreTrainedModel:
    vision = dict(
        Qwen2VL=dict(depth=2, embed_dim=16, mlp_ratio=2, num_heads=2, hidden_size=32),
        Qwen2_5_VL=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
    )[family]
    config = getattr(transformers, f"{family}Config")(
        text_config=dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]},
            bos_token_id=1,
            eos_token_id=2,
        ),
        vision_config=vision,
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL"])
@pytest.mark.parametrize("spelling", ["official", "new"])
@pytest.mark.parametrize(
    ("tied", "shards", "with_head"), [(True, 1, False), (True, 3, True), (False, 2, True)]
)
def test_hugging_face_directories(files, tmp_path, family, tied, shards, with_head, spelling):
    model = hugging_face_model(family, tied).to(torch.bfloat16)
    directory = tmp_path / "mllm"
    model.save_pretrained(directory)  # transformers' own config.json
    (directory / "model.safetensors").unlink()
    tensors = {
        name: x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        for name, x in model.state_dict().items()
        if with_head or name != "lm_head.weight"
    }
    assert any(name.startswith("model.visual.") for name in tensors)
    renamed = {qwen_vl.official_name(name): x for name, x in tensors.items()}
    golden.write_safetensors(directory, tensors if spelling == "new" else renamed, shards)
    from_torch(tmp_path / "out", mllm=directory, sam=files / "sam", num_queries=4)
    if tied:
        renamed.pop("lm_head.weight", None)
    params = read(tmp_path / "out")
    assert ("language/lm_head/embedding" in params) == (not tied)
    back = official_from(params, lens_config(tmp_path / "out"))
    assert_equal({n: x for n, x in back.items() if n.startswith(qwen_vl.PREFIXES)}, renamed)
    scheme = {"Qwen2VL": "qwen2vl", "Qwen2_5_VL": "qwen2p5vl"}[family]
    assert checkpoints.read_config(tmp_path / "out")["coordinates"] == scheme


@pytest.mark.parametrize(("tied", "shards"), [(True, 2), (False, 1)])
def test_a_lens_on_qwen2_vl(tmp_path, tied, shards):
    tensors = qwen2_vl.write_lens(GOLDEN, tmp_path / "lens", tied=tied, shards=shards)
    conversion = from_torch(tmp_path / "out", lens=tmp_path / "lens")
    config = checkpoints.read_config(tmp_path / "out")
    assert (config["coordinates"], config["context_positions"]) == ("qwen2vl", "text")
    assert_equal(official_from(read(tmp_path / "out"), lens_config(tmp_path / "out")), tensors)
    assert conversion.dropped == ()


def test_weights_of_the_other_family_are_refused(tmp_path, files, capsys):
    """A config of Qwen2-VL, weights of Qwen2.5-VL: one line, not every tensor of the tower."""
    qwen2 = qwen2_vl.write_mllm(GOLDEN, tmp_path / "qwen2")
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    shutil.copy(qwen2 / "config.json", mllm / "config.json")
    [error] = fails(capsys, tmp_path / "out", "--mllm", mllm, "--sam", files / "sam")
    assert f"{mllm / 'config.json'}: vision_config is that of Qwen2-VL" in error
    assert "the weights have that of Qwen2.5-VL" in error


def test_sam_under_hugging_faces_names(files, tmp_path, official):
    config = read_sam2(json.loads((files / "sam/sam2_config.json").read_text()))
    tensors, rows = {}, {}
    for entry in sam2.table(config).entries:
        name, row = sam2.hf_source(config, entry.source)
        x = official[f"sam.{entry.source}"]
        if row is None:
            tensors[name] = x
        else:
            rows.setdefault(name, {})[row] = x
    for name, parts in rows.items():
        tensors[name] = np.concatenate([parts[i] for i in sorted(parts)])
    tensors["memory_encoder.projection.bias"] = np.ones(3, np.float32)
    directory = tmp_path / "sam"
    directory.mkdir()
    golden.write_safetensors(directory, tensors)
    (directory / "sam2_config.json").write_text(json.dumps(write_sam(config)))
    conversion = from_torch(tmp_path / "out", lens=files / "lens", sam=directory)
    assert "sam.memory_encoder.projection.bias" in conversion.dropped
    back = official_from(read(tmp_path / "out"), lens_config(tmp_path / "out"))
    used = {e.source for e in sam2.table(config).with_prefix("sam.").entries}
    assert_equal(
        {n: x for n, x in back.items() if n in used},
        {n: x for n, x in official.items() if n in used},
    )


def test_published_sam_is_told_by_its_shapes():
    with torch.device("meta"):
        theirs = transformers.Sam2Model(transformers.Sam2Config()).state_dict()
    shapes = {sam2.original_encoder_name(n): tuple(x.shape) for n, x in theirs.items()}
    assert sam2.recognise(shapes) == PRESETS["tiny"]


# --- what goes wrong ------------------------------------------------------------------------------


def fails(capsys, output: Path, *arguments: str) -> list[str]:
    """Runs a conversion that must fail, leaving nothing; returns what it printed."""
    assert main(["from_torch", *map(str, arguments), "--output", str(output)]) == 2
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return [line.removeprefix("error: ") for line in lines]


def test_wrong_tensors_are_listed_by_name_and_nothing_is_written(files, tmp_path, official, capsys):
    broken = dict(official)
    del broken["model.norm.weight"]
    del broken["sam.no_mem_embed"]
    broken["stranger"] = np.zeros(2, np.float32)
    broken["conv_1d.bias"] = np.zeros(3, np.float32)
    broken["sam.sam_mask_decoder.conv_s0.weight"] = np.zeros((32, 8, 1, 1), np.float32)
    golden.write_lens(GOLDEN, tmp_path / "lens", broken)
    errors = fails(capsys, tmp_path / "out", "--lens", tmp_path / "lens")
    wanted = (
        "missing tensor model.norm.weight",
        "missing tensor sam.no_mem_embed",
        "unexpected tensor stranger",
        "misshapen tensor conv_1d.bias: shape [3]",
        "misshapen tensor sam.sam_mask_decoder.conv_s0.weight: shape [32, 8, 1, 1]",
    )
    assert len(errors) == len(wanted)
    for text in wanted:
        assert sum(text in line and str(tmp_path / "lens") in line for line in errors) == 1, text


def test_errors_of_both_parents_come_together(files, tmp_path, capsys):
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    tensors = golden.mllm_tensors(GOLDEN)
    del tensors["visual.merger.ln_q.weight"]
    golden.write_safetensors(mllm, tensors)
    sam = golden.write_sam(GOLDEN, tmp_path / "sam")
    save_file(load_file(sam) | {"odd": np.zeros(1, np.float32)}, sam)
    errors = fails(capsys, tmp_path / "out", "--mllm", mllm, "--sam", sam)
    assert len(errors) == 2
    assert f"{mllm}: missing tensor visual.merger.ln_q.weight" in errors
    assert f"{sam}: unexpected tensor sam.odd with shape [1]" in errors


def test_a_head_that_is_not_tied_is_refused(files, tmp_path, capsys):
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    config = json.loads((mllm / "config.json").read_text())
    (mllm / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = golden.mllm_tensors(GOLDEN)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    golden.write_safetensors(mllm, tensors)
    [error] = fails(capsys, tmp_path / "out", "--mllm", mllm, "--sam", files / "sam")
    assert "lm_head.weight differs from model.embed_tokens.weight" in error


def test_two_spellings_of_one_tensor_are_refused(files, tmp_path, capsys):
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    golden.write_safetensors(
        mllm, golden.mllm_tensors(GOLDEN) | golden.mllm_tensors(GOLDEN, new_names=True)
    )
    errors = fails(capsys, tmp_path / "out", "--mllm", mllm, "--sam", files / "sam")
    assert any("model.norm.weight is there in two spellings" in line for line in errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mllm={files}/lens", "--sam={files}/sam"],
            "is a LENS checkpoint; convert it with --lens",
        ),
        (["--lens={files}/mllm"], "is no LENS checkpoint"),
        (["--mllm={files}/mllm"], "--mllm needs --sam"),
        (["--sam={files}/sam"], "give either --mllm"),
        (["--lens={files}/lens", "--mllm={files}/mllm"], "give either --mllm"),
        (["--lens={files}/nowhere"], "nowhere/config.json: no such file"),
        (["--lens={files}/lens", "--sam={files}/nothing.pt"], "nothing.pt: no such file"),
        (["--mllm={files}/mllm", "--sam={files}/sam", "--num_queries=0"], "at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_to_do(files, tmp_path, capsys, arguments, message):
    arguments = [argument.format(files=files) for argument in arguments]
    [error] = fails(capsys, tmp_path / "out", *arguments)
    assert message in error


def test_a_checkpoint_without_sam_asks_for_it(tmp_path, official, capsys):
    tensors = {n: x for n, x in official.items() if not n.startswith("sam.")}
    golden.write_lens(GOLDEN, tmp_path / "lens", tensors)
    [error] = fails(capsys, tmp_path / "out", "--lens", tmp_path / "lens")
    assert "name SAM's weights with --sam FILE" in error


def test_another_model_is_refused(files, tmp_path, capsys):
    mllm = golden.write_mllm(GOLDEN, tmp_path / "mllm")
    config = json.loads((mllm / "config.json").read_text())
    for change, said in (
        ({"model_type": "qwen3_vl"}, "model_type is qwen3_vl"),
        ({"model_type": "qwen2_vl"}, "not Qwen2.5-VL"),
    ):
        vision = {k: v for k, v in config["vision_config"].items() if k != "fullatt_block_indexes"}
        (mllm / "config.json").write_text(json.dumps(config | change | {"vision_config": vision}))
        [error] = fails(capsys, tmp_path / "out", "--mllm", mllm, "--sam", files / "sam")
        assert str(mllm / "config.json") in error and said in error


def test_unknown_sam_shapes_ask_for_a_configuration(files, tmp_path, capsys):
    sam = golden.write_sam(GOLDEN, tmp_path / "sam")
    (sam.parent / "sam2_config.json").unlink()
    [error] = fails(capsys, tmp_path / "out", "--mllm", files / "mllm", "--sam", sam)
    assert str(sam) in error and "sam2_config.json" in error


def test_an_existing_directory_is_left_alone(files, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    assert main(["from_torch", f"--lens={files / 'lens'}", f"--output={output}"]) == 2
    assert str(output) in capsys.readouterr().err
    assert [f.name for f in output.iterdir()] == ["mine"]


def test_missing_files_are_named(files, tmp_path, caplog):
    """Weights are converted all the same."""
    lens = tmp_path / "lens"
    shutil.copytree(files / "lens", lens)
    names = ("tokenizer.json", "generation_config.json", "preprocessor_config.json")
    settings = json.loads((lens / names[2]).read_text())
    for name in names:
        (lens / name).unlink()
    from_torch(tmp_path / "weights", lens=lens)
    for name, line in zip(names, caplog.text.splitlines(), strict=True):
        assert f"{lens / name} is missing: before" in line
    caplog.clear()
    for name in names[:2]:
        shutil.copy(files / "lens" / name, lens / name)
    (lens / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    from_torch(tmp_path / "out", lens=lens)
    assert (tmp_path / "out" / "processor_config.json").is_file() and not caplog.text


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["from_torch", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "--mllm Qwen2.5-VL-3B-Instruct" in printed and "--num_queries" in printed
    assert main(["from_torch", "--outputs", "x"]) == 2
    assert "--outputs (did you mean --output?)" in capsys.readouterr().err
    assert main(["from_troch"]) == 2
    assert "unknown command from_troch (did you mean from_torch?)" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "to_torch" in capsys.readouterr().out
