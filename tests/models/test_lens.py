"""The packed group against every completion as a sequence of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lens_jax.models.lens import LensConfig
from lens_jax.models.qwen_vl.head import logits
from tests import micro

ROWS = [((4, 4), (3, 4)), ((6, 10), (1, 2))]
LENGTHS = np.array([[4, 0, 6], [1, 5, 2]], np.int32)
T = 6


def batch(scheme="mrope", **padding):
    config = dataclasses.replace(micro.CONFIG, context_positions=scheme)
    rows = [micro.row(config, grid, text, i) for i, (grid, text) in enumerate(ROWS)]
    tokens = np.random.default_rng(5).integers(0, 58, (*LENGTHS.shape, T)).astype(np.int32)
    return config, micro.collate(config, rows, **padding), tokens


def split(config):
    """The parameters a scoring pass uses, as nested state, and how to make a model of them."""
    model = micro.model(config)
    definition, used, rest = nnx.split(model, lambda path, _: path[0] != "sam", ...)
    return used, lambda used: nnx.merge(definition, used, rest)


def one_by_one(model, prompts, tokens, lengths):
    """Sequences [prompt | completion | queries | padding], each a row of a plain causal pass."""
    (b, g, t), m = tokens.shape, model.config.num_queries
    total = prompts.tokens.shape[1] + t + m
    # Where in [prompt with padding | completion with padding | queries] each token comes from.
    source = np.zeros((b, g, total), np.int64)
    positions = np.zeros((b, g, 3, total), np.int32)
    p = prompts.tokens.shape[1]
    for i in range(b):
        for j in range(g):
            n, own = int(prompts.length[i]), int(lengths[i, j])
            order = [*range(n), *range(p, p + own), *range(p + t, p + t + m)]
            source[i, j, : len(order)] = order
            along = np.arange(len(order))
            positions[i, j, :, : len(order)] = along
            if model.config.context_positions == "mrope":
                positions[i, j, :, :n] = prompts.positions[i, :, :n]
                following = prompts.positions[i, :, :n].max() + 1
                positions[i, j, :, n : len(order)] = following + along[: own + m]
    ends = np.asarray(prompts.length)[:, None] + lengths
    embedded = model.embed(prompts)
    parts = [
        jnp.broadcast_to(embedded[:, None], (b, g, *embedded.shape[1:])),
        model.language.embed_tokens(tokens),
        jnp.broadcast_to(model.context.queries[...], (b, g, *model.context.queries.shape)),
    ]
    sequence = jnp.take_along_axis(jnp.concatenate(parts, axis=2), source[..., None], axis=2)
    flat = lambda x: x.reshape(b * g, *x.shape[2:])  # noqa: E731
    mask = np.arange(total) < flat(ends)[:, None] + m
    hidden, _ = model.language.prefill(flat(sequence), flat(positions), mask)
    hidden = hidden.reshape(b, g, total, -1)
    pick = lambda first, count: jnp.take_along_axis(  # noqa: E731
        hidden, (first[..., None] + np.arange(count))[..., None], axis=2
    )
    begins = np.broadcast_to(np.asarray(prompts.length)[:, None], lengths.shape)
    log_probs = jax.nn.log_softmax(logits(pick(begins - 1, t), model.language.head))
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1)
    taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    return taken, entropy, pick(ends, m)


def packed(model, prompts, tokens, lengths):
    score = model.score(prompts, model.embed(prompts), tokens, lengths, with_queries=True)
    return score.log_probs, score.entropy, score.hidden


@pytest.mark.parametrize(("scheme", "group"), [("mrope", 3), ("text", 3), ("mrope", 1)])
def test_packed_group_equals_sequences(scheme, group):
    config, prompts, tokens = batch(scheme, more_tokens=2)
    tokens, lengths = tokens[:, :group], LENGTHS[:, :group]
    used, model_of = split(config)
    rng = np.random.default_rng(7)
    counted = np.arange(T) < lengths[..., None]
    weigh = [rng.standard_normal((*lengths.shape, T)) * counted for _ in range(2)]
    weigh.append(rng.standard_normal((*lengths.shape, config.num_queries, 32)))

    def run(function):
        def weighted(used):
            outs = function(model_of(used), prompts, tokens, lengths)
            return sum((w * x).sum() for w, x in zip(weigh, outs, strict=True)), outs

        return jax.jit(jax.grad(weighted, has_aux=True))(used)

    (ours, outs), (theirs, expected) = run(packed), run(one_by_one)
    for x, y, kept in zip(outs, expected, (counted, counted, lengths >= 0), strict=True):
        micro.close(np.asarray(x)[kept], np.asarray(y)[kept])
    assert float(jnp.abs(ours["context"]["queries"][...]).max()) > 0
    micro.same_gradients(ours, theirs)


@pytest.fixture(scope="module")
def scoring():
    used, model_of = split(micro.CONFIG)
    run = jax.jit(lambda *args: packed(model_of(used), *args))

    def score(prompts, tokens, lengths=LENGTHS):
        log_probs, entropy, hidden = (np.asarray(x) for x in run(prompts, tokens, lengths))
        counted = np.arange(log_probs.shape[-1]) < lengths[..., None]
        return log_probs[counted], entropy[counted], hidden

    return score


@pytest.fixture(scope="module")
def expected(scoring):
    _, prompts, tokens = batch()
    return scoring(prompts, tokens)


def check(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        micro.close(ours, theirs, 1e-5)


def test_padding_changes_nothing(scoring, expected):
    _, prompts, tokens = batch(more_tokens=5, more_windows=2)
    tokens = np.pad(tokens, ((0, 0), (0, 0), (0, 3)), constant_values=9)
    check(scoring(prompts, tokens), expected)


def test_tokens_after_the_end_change_nothing(scoring, expected):
    _, prompts, tokens = batch()
    after = np.arange(T) >= LENGTHS[..., None]
    changed = np.where(after, (tokens + 11) % 58, tokens).astype(np.int32)
    assert (changed != tokens).any()
    check(scoring(prompts, changed), expected)


def test_members_of_a_group_are_independent(scoring, expected):
    _, prompts, tokens = batch()
    tokens[:, 0] = (tokens[:, 0] + 1) % 58
    hidden = scoring(prompts, tokens)[2]
    micro.close(hidden[:, 1:], expected[2][:, 1:], 1e-5)
    assert np.abs(hidden[:, 0] - expected[2][:, 0]).max() > 1e-3


def test_queries_do_not_change_the_text(expected):
    """They come after it; so the reference, which runs without them, sees the same text."""
    config, prompts, tokens = batch()
    used, model_of = split(config)

    @jax.jit
    def without(used, tokens):
        model = model_of(used)
        return model.score(prompts, model.embed(prompts), tokens, LENGTHS, with_queries=False)

    score = without(used, tokens)
    counted = np.arange(T) < LENGTHS[..., None]
    assert score.hidden is None
    micro.close(np.asarray(score.log_probs)[counted], expected[0], 1e-5)
    micro.close(np.asarray(score.entropy)[counted], expected[1], 1e-5)


@pytest.mark.parametrize("scheme", ["mrope", "text"])
def test_reading_apart_equals_the_packed_pass(scheme):
    config, prompts, tokens = batch(scheme, more_tokens=3)
    used, model_of = split(config)
    weight = np.random.default_rng(3).standard_normal((len(tokens), 1, config.num_queries, 32))

    def apart(model, tokens, lengths):
        return model.encode_queries(prompts, model.embed(prompts), tokens[:, :1], lengths[:, :1])

    def together(model, tokens, lengths):
        return packed(model, prompts, tokens, lengths)[2]

    def run(function, member):
        pick = slice(member, member + 1)

        def weighted(used):
            hidden = function(model_of(used), tokens[:, pick], LENGTHS[:, pick])
            return (weight * hidden).sum(), hidden

        return jax.jit(jax.grad(weighted, has_aux=True))(used)

    for member in (0, 1):
        (ours, hidden), (theirs, expected) = run(apart, member), run(together, member)
        micro.close(hidden, expected)
        micro.same_gradients(ours, theirs)


def test_unknown_position_scheme():
    with pytest.raises(ValueError, match="context_positions: 'plain'"):
        LensConfig(micro.CONFIG.mllm, micro.CONFIG.sam, context_positions="plain")
