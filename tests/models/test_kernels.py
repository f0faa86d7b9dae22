"""The kernels of accelerators against XLA's attention; on CPU, splash runs interpreted."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lens_jax.aot import flops
from lens_jax.models import kernels, layers
from lens_jax.models.lens import abstract
from lens_jax.models.long_attention import Attention
from tests import micro, tpu


@pytest.fixture
def interpreted(monkeypatch):
    """Splash on CPU, in blocks so small that sequences of tests have several."""
    make = splash_attention_kernel.make_splash_mha_single_device
    monkeypatch.setattr(
        splash_attention_kernel, "make_splash_mha_single_device", partial(make, interpret=True)
    )
    monkeypatch.setattr(kernels, "BLOCKS", (128,))


@pytest.fixture
def calls(monkeypatch):
    """cuDNN's place taken by XLA; the calls that were meant for it."""
    made, compute = [], jax.nn.dot_product_attention

    def call(queries, keys, values, *, implementation, **options):
        made.append((implementation, queries.shape, keys.shape, options))
        return compute(queries, keys, values, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return made


def parts(length, heads=4, kv_heads=2, head_dim=8, batch=2):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.standard_normal((batch, length, n, head_dim)).astype(np.float32)  # noqa: E731
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def count_kernels(jaxpr) -> int:
    """Pallas kernels in a program; a body that it calls several times counts each time."""
    return sum(
        equation.primitive.name == "pallas_call"
        or sum(map(count_kernels, flops.inner_jaxprs(equation.params)))
        for equation in jaxpr.eqns
    )


def packed_valid(prompt, group, part, queries=2):
    """Prompts of two lengths, completions from length 0, then queries; what is padding is False."""
    rng = np.random.default_rng(1)
    index = np.arange(part)
    lengths = rng.integers(0, part - queries + 1, (2, group, 1))
    if group:
        lengths[0, 0] = 0
    own = (index < lengths) | (index >= part - queries)
    before = np.arange(prompt) < np.array([[prompt], [max(1, prompt // 3)]])
    before[1, -3:] = True  # as when a completion follows a padded prompt
    return np.concatenate([before, own.reshape(2, -1)], axis=1)


def run(function, queries, keys, values, weights, valid):
    """Outputs where they count, and gradients of their weighted sum."""

    def total(parts):
        out = function(*parts, valid)
        counted = jnp.where(valid[..., None, None], out, 0)
        return (counted * weights).sum(), (counted, out)

    value = jax.jit(jax.grad(total, has_aux=True))
    gradients, (counted, out) = value((queries, keys, values))
    assert jnp.isfinite(out).all()
    return {"out": counted, "queries": gradients[0], "keys": gradients[1], "values": gradients[2]}


# Prompt, group, part: no group, one block, several blocks, parts that straddle them, odd lengths.
PACKED = [(130, 0, 0), (70, 1, 20), (100, 3, 70), (37, 3, 41)]


@pytest.mark.parametrize(("prompt", "group", "part"), PACKED)
def test_packed_splash(interpreted, prompt, group, part):
    check_packed("splash", prompt, group, part)


@pytest.mark.parametrize(("prompt", "group", "part"), PACKED)
def test_packed_cudnn(calls, prompt, group, part):
    check_packed("cudnn", prompt, group, part)
    for implementation, queries, keys, options in calls:
        assert implementation == "cudnn"
        # What cuDNN asks for in training.
        assert (queries[1] % 2, keys[1] % 2) == (0, 0)
        assert options.keys() == {"mask"}


def test_cudnn_on_a_gpu():
    """bfloat16, as cuDNN wants it; JAX_PLATFORMS=cuda lets it run."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    valid = packed_valid(37, 3, 41)
    inputs = (*(jnp.bfloat16(x) for x in parts(37 + 3 * 41, head_dim=128)), valid)
    for method in (partial(Attention.packed, prompt=37, group=3), Attention.full):
        ours, theirs = (run(partial(method, Attention(name)), *inputs) for name in ("cudnn", "xla"))
        micro.same_gradients(ours, theirs, 2e-2)


def check_packed(kernel, prompt, group, part):
    inputs = (*parts(prompt + group * part), packed_valid(prompt, group, part))
    ours, theirs = (
        run(partial(Attention(name).packed, prompt=prompt, group=group), *inputs)
        for name in (kernel, "xla")
    )
    micro.same_gradients(ours, theirs, 1e-5)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
@pytest.mark.parametrize("length", [64, 192])
def test_full(interpreted, calls, kernel, length):
    """Padding may lie anywhere, as at the lower and right edge of windows."""
    valid = np.random.default_rng(2).random((2, length)) < 0.6
    valid[:, 0] = True
    inputs = (*parts(length, kv_heads=4), valid)
    ours, theirs = (run(Attention(name).full, *inputs) for name in (kernel, "xla"))
    micro.same_gradients(ours, theirs, 1e-5)


def test_a_picture_of_padding_is_finite(interpreted):
    nothing = np.zeros((2, 64), bool)
    out = jax.jit(jax.grad(lambda *args: Attention("splash").full(*args, nothing).sum()))
    assert jnp.isfinite(out(*parts(64)[:3])).all()


def test_masked_blocks_are_not_computed():
    """Of 6 x 6 blocks: the prompt's column, and a completion's own."""
    mask = kernels.PackedMask(768, prompt=128, part=128)
    block = lambda i: slice(128 * i, 128 * (i + 1))  # noqa: E731
    seen = [[mask[block(i), block(j)].any() for j in range(6)] for i in range(6)]
    np.testing.assert_array_equal(seen, np.eye(6, dtype=bool) | (np.arange(6) == 0))


@pytest.mark.parametrize(
    ("length", "padded", "block"),
    [(100, 128, 128), (400, 512, 512), (1262, 1280, 640), (2990, 3072, 512), (4096, 4096, 512)],
)
def test_blocks_pad_little(length, padded, block):
    assert kernels._blocks(length) == (padded, block)


def test_too_long_for_the_mask():
    with pytest.raises(ValueError, match=r"40000 tokens .* attention: xla"):
        kernels.PackedMask(40000, 100, 100)


def mesh_of(data, fsdp, tensor, devices=None):
    return jax.make_mesh(
        (data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=devices
    )


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 4)])
def test_on_a_mesh(interpreted, shape):
    """Rows over data x fsdp; two KV heads over a tensor axis of 2, whole on one of 4."""
    mesh = mesh_of(*shape)
    inputs = (*parts(60), packed_valid(20, 2, 20))
    rows = jax.NamedSharding(mesh, P(("data", "fsdp")))
    placed = jax.device_put(inputs, rows)
    attention = Attention("splash", mesh)
    ours = run(partial(attention.packed, prompt=20, group=2), *placed)
    theirs = run(partial(Attention().packed, prompt=20, group=2), *inputs)
    micro.same_gradients(ours, theirs, 1e-5)


def test_inside_of_another_shard_map(interpreted):
    """The rollout runs on each device's rows as a whole."""
    mesh = mesh_of(1, 2, 1)
    *tokens, _ = parts(40)
    valid = np.ones((2, 40), bool)
    rows = P(("data", "fsdp"))
    attend = partial(Attention("splash", mesh).packed, prompt=40, group=0)
    inside = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    expected = Attention().packed(*tokens, valid, prompt=40, group=0)
    micro.close(jax.jit(inside)(*tokens, valid), expected, 1e-5)


def test_in_the_model(interpreted):
    """The packed pass, layers computed again in its backward pass, vision tower and SAM 2."""
    # A block of the trunk that sees whole pictures and does not pool.
    sam = dataclasses.replace(micro.CONFIG.sam, stages=(1, 1, 2, 1), global_att_blocks=(3,))
    config = dataclasses.replace(micro.CONFIG, sam=sam)
    weights = nnx.state(micro.model(config))
    rows = [micro.row(config, (4, 6), (3, 4), 0), micro.row(config, (8, 4), (2, 9), 1)]
    prompts = micro.collate(config, rows)
    completions = np.random.default_rng(3).integers(0, 50, (2, 2, 6)).astype(np.int32)
    lengths = np.array([[6, 1], [3, 4]], np.int32)
    counted = np.arange(6) < lengths[..., None]

    def gradient(**options):
        definition = nnx.graphdef(abstract(config, **options))

        def total(weights):
            model = nnx.merge(definition, weights)
            embedded = model.embed(prompts)
            score = model.score(prompts, embedded, completions, lengths, with_queries=True)
            read = (score.log_probs * counted).sum() + score.hidden.sum()
            return read, model.sam_features(prompts).image_embed

        return jax.jit(jax.grad(total, has_aux=True)).trace(weights)

    ours = gradient(attention=Attention("splash"), remat="dots")
    # Forward, again in the backward pass (which the compiler drops), two backward; SAM is frozen.
    # jax 0.12 leaves out two of those that the compiler drops.
    assert count_kernels(ours.jaxpr.jaxpr) in (4 + 4 + 1, 4 + 4 + 1 - 2)
    ours, theirs = (x.lower().compile()(weights) for x in (ours, gradient()))
    micro.same_gradients(ours[0], theirs[0])
    micro.close(ours[1], theirs[1])


def device(platform, version=""):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform=platform, client=client)


CPU, TPU = device("cpu"), device("tpu")
CUDA, ROCM = device("gpu", "cuda 12090"), device("gpu", "rocm 60400")


def choose(wanted, device, dtype=jnp.bfloat16, head_dims=(128, 80)):
    mesh = SimpleNamespace(devices=np.array([device], object))
    return Attention.choose(wanted, mesh, dtype=dtype, head_dims=head_dims).kernel


@pytest.mark.parametrize(
    ("device", "options", "kernel"),
    [
        (CPU, {}, "xla"),
        (TPU, {}, "splash"),
        (TPU, {"dtype": jnp.float32, "head_dims": (8,)}, "splash"),
        (CUDA, {}, "cudnn"),
        (CUDA, {"dtype": jnp.float32}, "xla"),
        (CUDA, {"head_dims": (160, 80)}, "xla"),
        (CUDA, {"head_dims": (128, 20)}, "xla"),
        (ROCM, {}, "xla"),
    ],
)
def test_auto(device, options, kernel):
    assert choose("auto", device, **options) == kernel
    assert choose("xla", device, **options) == "xla"


@pytest.mark.parametrize(
    ("wanted", "device", "options", "message"),
    [
        ("splash", CPU, {}, "splash runs on TPU, not on cpu; use auto or xla"),
        ("splash", CUDA, {}, "splash runs on TPU, not on gpu"),
        ("cudnn", TPU, {}, "cudnn runs on NVIDIA GPUs, not on tpu"),
        ("cudnn", ROCM, {}, "cudnn runs on NVIDIA GPUs"),
        ("cudnn", CUDA, {"dtype": jnp.float32}, "16-bit numbers, not float32"),
        ("cudnn", CUDA, {"head_dims": (128, 20)}, "a multiple of 8, not 20"),
    ],
)
def test_named_kernels_that_do_not_run(wanted, device, options, message):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        choose(wanted, device, **options)


# ---- compiled for TPU ----------------------------------------------------------------------------


def gradients(attend):
    def total(queries, keys, values, valid, weights):
        out = attend(queries, keys, values, valid)
        return (out.astype(jnp.float32) * weights).sum()

    return jax.grad(total, argnums=(0, 1, 2))


def shapes(batch, length, heads, kv_heads, head_dim):
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((batch, length, *shape), dtype)  # noqa: E731
    tokens = [of(n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return *tokens[:3], of(dtype=bool), tokens[3]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("method", "inputs"),
    [
        # Qwen2.5-VL 3B: eight completions of 40 tokens and 64 queries; a picture of 30 windows.
        (partial(Attention.packed, prompt=430, group=8), shapes(4, 430 + 8 * 104, 16, 2, 128)),
        (Attention.full, shapes(4, 30 * 64, 16, 16, 80)),
        (partial(Attention.packed, prompt=100, group=2), shapes(1, 200, 4, 2, 64)),
    ],
    ids=["group", "picture", "head_dim_64"],
)
def test_compiled(method, inputs):
    """Splash compiles, forward and backward, and no scores of whole sequences are in memory."""
    with jax.default_matmul_precision("default"):
        compiled = tpu.compile_for_one(gradients(partial(method, Attention("splash"))), *inputs)
    assert compiled.as_text().count("tpu_custom_call") == 3
    queries = inputs[0]
    batch, length, heads, _ = queries.shape
    scores = 4 * batch * heads * length**2
    assert length < 1000 or compiled.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.compiled
@pytest.mark.parametrize(("remat", "calls"), [("none", 3), ("dots", 3), ("full", 4)])
def test_what_is_computed_again(remat, calls):
    """In a stack of layers `dots` keeps what the forward kernel wrote, `full` runs it twice."""
    tokens, *_, valid, _ = shapes(1, 200, 4, 4, 64)
    stack = layers.stack(
        lambda rngs: nnx.Linear(64, 64, dtype=jnp.bfloat16, rngs=rngs), 3, nnx.Rngs(0)
    )
    definition, weights = nnx.split(stack)

    def total(weights, x, valid):
        def step(layer, x):
            y = layer(x)
            return y + Attention("splash").full(y, y, y, valid), None

        x, _ = layers.scan(nnx.merge(definition, weights), step, x, remat=remat)
        return x.astype(jnp.float32).sum()

    with jax.default_matmul_precision("default"):
        compiled = tpu.compile_for_one(jax.grad(total), weights, tokens, valid)
    assert compiled.as_text().count("tpu_custom_call") == calls


@pytest.mark.compiled
def test_compiled_for_a_mesh():
    """Each chip attends to its rows and heads, without a word to the others."""
    mesh = mesh_of(1, 2, 2, devices=tpu.devices())
    rows = jax.NamedSharding(mesh, P(("data", "fsdp")))
    heads = jax.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    *tokens, valid, weights = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=heads if x.ndim == 4 else rows)
        for x in shapes(4, 300, 4, 2, 128)
    )
    attend = partial(Attention("splash", mesh).packed, prompt=100, group=2)
    with jax.default_matmul_precision("default"):
        compiled = jax.jit(gradients(attend)).lower(*tokens, valid, weights).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 3
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute"))


@pytest.mark.compiled
def test_one_chip_within_an_update():
    """An update's shard_map leaves `tensor` out, which Pallas refuses unless it is added."""
    mesh = mesh_of(1, 1, 1, devices=tpu.devices()[:1])
    place = jax.NamedSharding(mesh, P(("data", "fsdp")))
    attend = partial(Attention("splash", mesh).packed, prompt=100, group=2)
    update = jax.shard_map(
        gradients(attend),
        mesh=mesh,
        in_specs=P(("data", "fsdp")),
        out_specs=P(("data", "fsdp")),
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    inputs = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes(4, 300, 4, 2, 128)
    )
    with jax.default_matmul_precision("default"):
        text = jax.jit(update).lower(*inputs).as_text()
    assert text.count("tpu_custom_call") == 3
