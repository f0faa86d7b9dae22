"""Recomputing layers in the backward pass, or gathering them again, changes no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lens_jax.aot import flops
from lens_jax.distribution.sharded import ShardedParameter
from lens_jax.models import layers
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import abstract, split_policy
from lens_jax.models.parameters import select
from lens_jax.training import alignment
from tests import micro

B, G, T = 1, 2, 3


def gradient_function(remat):
    """Of a weighted sum of everything that vision tower and language model put out."""
    model = abstract(micro.CONFIG, remat=remat)
    definition, _, rest = split_policy(model)
    prompts = micro.collate(micro.CONFIG, [micro.row(micro.CONFIG, (4, 6), (2, 3), seed=0)])
    tokens = np.array([[[3, 1, 4], [1, 5, 9]]], np.int32)
    lengths = np.array([[3, 2]], np.int32)
    weights = np.random.default_rng(0).standard_normal((B, G, T)).astype(np.float32)

    def loss(policy):
        model = nnx.merge(definition, policy, rest)
        score = model.score(prompts, model.embed(prompts), tokens, lengths, with_queries=False)
        return (weights * score.log_probs).sum() + score.entropy.sum()

    return jax.grad(loss)


@pytest.fixture(scope="module")
def policy():
    return split_policy(micro.model())[1]


@pytest.fixture(scope="module")
def expected(policy):
    return jax.jit(gradient_function("none"))(policy)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients(policy, expected, remat):
    function = gradient_function(remat)
    micro.same_gradients(jax.jit(function)(policy), expected)
    text = str(jax.make_jaxpr(function)(policy))
    assert "checkpoint" in text or "remat" in text


def test_dots_computes_no_product_again(policy):
    """Neither those of attention and wide layers, whose gradients are our own."""
    products = {
        remat: flops.count(gradient_function(remat), policy) for remat in layers.REMAT_POLICIES
    }
    assert products["dots"] == products["none"] < products["full"]


def test_none_computes_nothing_again(policy):
    text = str(jax.make_jaxpr(gradient_function("none"))(policy))
    assert "checkpoint" not in text and "remat" not in text


# --- stage 1, whose queries read apart from what they read ----------------------------------------

DEEP = dataclasses.replace(micro.CONFIG, mllm=dataclasses.replace(micro.CONFIG.mllm, num_layers=6))


def reading_gradient(remat):
    """Of a weighted sum of what the queries have read, by all of the language model."""
    definition, _, rest = nnx.split(
        abstract(DEEP, remat=remat), select(("language", "context")), ...
    )
    prompts = micro.collate(DEEP, [micro.row(DEEP, (4, 6), (3, 150), seed=i) for i in range(2)])
    answer, length = np.array([[3, 1, 4], [1, 5, 9]], np.int32), np.array([3, 2], np.int32)
    rng = np.random.default_rng(0)
    embedded = rng.standard_normal((*prompts.tokens.shape, 32)).astype(np.float32)
    weights = rng.standard_normal((2, 1, DEEP.num_queries, 32)).astype(np.float32)

    def loss(trained, embedded):
        model = nnx.merge(definition, trained, rest)
        return (
            weights * model.encode_queries(prompts, embedded, answer[:, None], length[:, None])
        ).sum()

    return jax.grad(loss, argnums=(0, 1)), embedded


@pytest.fixture(scope="module")
def readings():
    """By policy: gradients, and the bytes of the program's temporaries."""
    _, trained, _ = nnx.split(micro.model(DEEP), select(("language", "context")), ...)
    found = {}
    for remat in layers.REMAT_POLICIES:
        gradient, embedded = reading_gradient(remat)
        program = jax.jit(gradient).lower(trained, embedded).compile()
        temporaries = program.memory_analysis().temp_size_in_bytes
        found[remat] = program(trained, embedded), temporaries
    return found


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_reading_apart_has_the_same_gradients(readings, remat):
    (ours, embedded), (theirs, expected) = readings[remat][0], readings["none"][0]
    micro.same_gradients(ours, theirs)
    micro.close(embedded, expected)


def test_reading_apart_takes_less_memory(readings):
    none, dots, full = (readings[remat][1] for remat in ("none", "dots", "full"))
    assert full < 0.8 * dots < 0.8 * 0.8 * none


@pytest.mark.nightly
@pytest.mark.parametrize("trained", [("context", "language"), ("context", "visual", "language")])
def test_stage_1_takes_less_memory_where_language_or_tower_train(trained):
    def temporaries(remat):
        model = abstract(DEEP, remat=remat)
        definition, params, frozen = nnx.split(model, select(trained), ...)
        rows = [micro.row(DEEP, (4, 6), (3, 150), seed=i) for i in range(4)]
        batch = Batch(micro.collate(DEEP, rows), micro.targets(4), np.arange(4, dtype=np.int32))

        def loss(params, frozen, batch):
            return alignment.sums(nnx.merge(definition, params, frozen), batch)[0]

        program = jax.jit(jax.grad(loss)).lower(params, frozen, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


@pytest.mark.parametrize("remat", layers.REMAT_POLICIES)
def test_layers_in_parts(remat):
    """Each is gathered twice, never all; their gradients are those of whole layers, in parts."""
    depth, width = 3, 8
    stack = layers.stack(lambda rngs: nnx.Linear(width, width, rngs=rngs), depth, nnx.Rngs(0))
    definition, params = nnx.split(stack)
    x = jax.random.normal(jax.random.key(1), (4, width))

    def gradient(params, x, mark=lambda params: params):
        def loss(params):
            model = nnx.merge(definition, mark(params))
            y, _ = layers.scan(model, lambda layer, x: (jnp.tanh(layer(x)), None), x, remat=remat)
            return (y**2).sum()

        return jax.grad(loss)(params)

    def in_parts(params):
        def of(x):
            return ShardedParameter(x, "fsdp", -2, 2, x.dtype) if x.ndim == 3 else x

        return jax.tree.map(of, params)

    def local(params, x):
        return jax.tree.map(
            lambda g: g if g.ndim == 3 else jax.lax.psum(g, "fsdp"), gradient(params, x, in_parts)
        )

    specs = jax.tree.map(lambda x: P(None, "fsdp") if x.ndim == 3 else P(), params)
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(specs, P("fsdp")), out_specs=specs, check_vma=False
    )
    micro.same_gradients(jax.jit(run)(params, x), gradient(params, x))
    text = jax.jit(run).lower(params, x).as_text()
    assert text.count("stablehlo.all_gather") == 2 and text.count("stablehlo.reduce_scatter") == 1
    whole = f"tensor<{depth}x{width}x{width}xf32>"
    assert not any(whole in x for x in text.splitlines() if "dynamic_update_slice" in x)
