"""Log-probabilities and entropies by blocks of the vocabulary against plain log_softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax.models.qwen_vl.head import MAX_BLOCKS, _blocks, token_log_probs
from tests import micro, tpu

SHAPE, WIDTH = (2, 3, 4), 6


def plain(hidden, head, tokens):
    log_probs = jax.nn.log_softmax(hidden @ head.T)
    taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return taken, -(jnp.exp(log_probs) * log_probs).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("vocabulary", [1, 7, 24, 61, 600])
def test_token_log_probs(vocabulary, scale):
    """`scale` 40: logits in the hundreds, whose exponentials overflow without a maximum."""
    rng = np.random.default_rng(vocabulary)
    hidden = scale * rng.standard_normal((*SHAPE, WIDTH)).astype(np.float32)
    head = rng.standard_normal((vocabulary, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, vocabulary, SHAPE)
    tokens.flat[:2] = 0, vocabulary - 1
    weights = rng.standard_normal((2, *SHAPE)).astype(np.float32)

    def run(function):
        def weighted(hidden, head):
            outs = function(hidden, head, tokens)
            return sum((w * x).sum() for w, x in zip(weights, outs, strict=True)), outs

        return jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(hidden, head)

    (gradients, outs), (expected_gradients, expected) = run(token_log_probs), run(plain)
    for ours, theirs in zip(outs, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=4e-6 * scale)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max() + 1e-6)


def test_each_output_has_its_own_gradient():
    """A sum over both could hide an error in one: each alone, in bfloat16 hidden states too."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((5, WIDTH)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((24, WIDTH)), jnp.float32)
    tokens = rng.integers(0, 24, 5)
    run = lambda function, *args: jax.jit(  # noqa: E731
        lambda *args: [
            jax.grad(lambda h, e, i=which: function(h, e, tokens)[i].sum(), (0, 1))(*args)
            for which in range(2)
        ]
    )(*args)
    ours, theirs = run(token_log_probs, hidden, head), run(plain, hidden.astype("f4"), head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == (hidden.dtype if a.shape == hidden.shape else head.dtype)
        micro.close(a.astype(jnp.float32), b, 0.02)


@pytest.mark.parametrize(("vocabulary", "blocks"), [(151936, 8), (152064, 8), (61, 1), (14, 7)])
def test_blocks_divide_the_vocabulary(vocabulary, blocks):
    assert _blocks(vocabulary) == blocks <= MAX_BLOCKS


def test_memory_at_full_size():
    """Qwen2.5-VL-3B's head on 2,048 tokens, forward and backward, on a v5e: logits take 1.2 GB."""
    tokens, width, vocabulary = 2048, 2048, 151936

    def gradients(hidden, head, taken, weights):
        loss = lambda hidden, head: jnp.vdot(weights, token_log_probs(hidden, head, taken)[0])  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(hidden, head)

    with jax.default_matmul_precision("default"):
        compiled = tpu.compile_for_one(
            gradients,
            jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((vocabulary, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        )
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2e9
