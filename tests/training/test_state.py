"""Schedules, optimizer steps, accumulation, and which parameters a stage trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens_jax.config import AlignmentConfig, GRPOConfig, StageConfig
from lens_jax.distribution.gradients import accumulate
from lens_jax.models.parameters import PARTS, select
from lens_jax.models.sam.segmenter import Sam2
from lens_jax.training.state import (
    apply,
    create,
    make_optimizer,
    make_schedule,
)
from tests import micro


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules(kind, warmup):
    peak, steps = 0.3, 12
    schedule = make_schedule(
        StageConfig(schedule=kind, learning_rate=peak, warmup_steps=warmup, steps=steps)
    )
    for step in range(steps + 1):
        done = (step - warmup) / (steps - warmup)
        if step < warmup:
            expected = peak * step / warmup
        else:
            expected = {
                "constant": peak,
                "linear": peak * (1 - done),
                "cosine": peak * (1 + np.cos(np.pi * done)) / 2,
            }[kind]
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)


def adamw(**changes):
    options = dict(b1=0.9, b2=0.99, weight_decay=0.1, max_grad_norm=1.0) | changes
    return make_optimizer(StageConfig(learning_rate=0.01, schedule="constant", **options))


def test_first_step_is_adamw_after_clipping():
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
    optimizer = adamw()
    state, norm = apply(create(params, optimizer), gradients, jnp.float32(0), optimizer)
    assert norm == 5.0  # before clipping
    for name in params:
        g = gradients[name] / 5
        step = g / (jnp.abs(g) + 1e-8) + 0.1 * params[name]  # moments corrected: m = g, v = g^2
        np.testing.assert_allclose(state.params[name], params[name] - 0.01 * step, rtol=1e-5)
    assert (int(state.step), int(state.skipped)) == (1, 0)


@pytest.mark.parametrize("where", ["loss", "gradient", "infinite gradient"])
def test_an_update_that_is_not_finite_is_left_out(where):
    optimizer = adamw()
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
    good = jax.tree.map(lambda x: 0.1 * x, params)
    step = jax.jit(lambda *args: apply(*args, optimizer))
    state, _ = step(create(params, optimizer), good, jnp.float32(1))
    bad, loss = dict(good), jnp.float32(1)
    if where == "loss":
        loss = jnp.float32(jnp.nan)
    else:
        bad["b"] = jnp.full((1, 1), jnp.nan if where == "gradient" else jnp.inf)
    after, _ = step(state, bad, loss)
    before, kept = ((s.params, s.moments) for s in (state, after))
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    assert (int(after.step), int(after.skipped)) == (2, 1)
    # And training goes on as if it had not been.
    resumed, _ = step(after, good, jnp.float32(1))
    straight, _ = step(state, good, jnp.float32(1))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    assert (int(resumed.step), int(resumed.skipped)) == (3, 1)


def test_a_fresh_state_owns_its_arrays():
    """Updates donate the state; what it was made from must live on."""
    params = {"a": jnp.arange(3.0)}
    optimizer = adamw()
    state = create(params, optimizer)
    gradients = {"a": jnp.ones(3)}
    update = jax.jit(lambda s: apply(s, gradients, jnp.float32(0), optimizer)[0], donate_argnums=0)
    update(state)
    assert state.params["a"].is_deleted()
    np.testing.assert_array_equal(params["a"], np.arange(3.0))


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accumulation_equals_one_batch(micro_batches):
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.standard_normal((8, 3)).astype("f4"),
        "y": rng.standard_normal(8).astype("f4"),
    }
    w = jnp.array([0.3, -1.0, 2.0])

    def gradient_of_sums(batch):
        def loss(w):
            error = jnp.tanh(batch["x"] @ w) - batch["y"]
            return (error**2).sum(), {"loss": (error**2).sum(), "rows": jnp.float32(len(error))}

        return jax.grad(loss, has_aux=True)(w)

    gradient, metrics = jax.jit(lambda b: accumulate(gradient_of_sums, b, micro_batches))(batch)
    expected, expected_metrics = gradient_of_sums(batch)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    assert metrics["rows"] == 8


def names(state) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


@pytest.fixture(scope="module", params=[micro.CONFIG, micro.WITH_SAM1], ids=["sam2", "sam1"])
def model(request):
    return micro.model(request.param)


def test_alignment_trains_the_context_module_alone(model):
    everything = names(nnx.state(model))
    _, trained, frozen = nnx.split(model, select(AlignmentConfig().trained), ...)
    assert names(trained) == {name for name in everything if name.startswith("context/")}
    assert names(trained) | names(frozen) == everything and not names(trained) & names(frozen)


def test_grpo_trains_all_but_sams_image_side(model):
    everything = names(nnx.state(model))
    _, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    assert names(trained) | names(frozen) == everything and not names(trained) & names(frozen)
    matrix = {name for name in everything if name.endswith("positional_encoding_gaussian_matrix")}
    encoder = {name for name in everything if name.startswith("sam/image_encoder/")}
    only_sam2 = {"sam/no_mem_embed"} if isinstance(model.sam, Sam2) else set()
    assert len(matrix) == 1 and encoder and only_sam2 <= everything
    assert names(frozen) == encoder | matrix | only_sam2
    for part in ("visual", "language", "context", "sam/sam_mask_decoder", "sam/sam_prompt_encoder"):
        assert any(name.startswith(part) for name in names(trained))


def test_parts_cover_every_parameter_once(model):
    everything = names(nnx.state(model))
    parts = {part: names(nnx.split(model, select((part,)), ...)[1]) for part in PARTS}
    constant = {name for name in everything if name.endswith("positional_encoding_gaussian_matrix")}
    assert all(parts.values()) and sum(map(len, parts.values())) == len(everything - constant)
    assert set().union(*parts.values()) == everything - constant
    language, encoder = parts["language"], parts["sam_encoder"]
    assert all(name.startswith("language/") for name in language)
    assert not any("decoder" in name or "prompt" in name for name in encoder)


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), GRPOConfig().trained], ids=str)
def test_moments_exist_for_trained_parameters_alone(model, parts):
    _, trained, _ = nnx.split(model, select(parts), ...)
    state = jax.eval_shape(lambda p: create(p, adamw()), trained)
    sizes = [sum(x.size for x in jax.tree.leaves(t)) for t in (trained, state.moments)]
    counts = sum(x.size for x in jax.tree.leaves(state.moments) if x.ndim == 0)
    assert sizes[1] - counts == 2 * sizes[0]
