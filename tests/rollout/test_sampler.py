"""Rollout against full forward passes of the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import RepetitionPenaltyLogitsProcessor

from lens_jax.models.lens import split_policy
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.qwen_vl.language import LanguageModel
from lens_jax.rollout.sampler import generate, rollout
from lens_jax.rollout.sampling import GREEDY, Sampling
from tests import micro

torch = pytest.importorskip("torch")

ROWS = [
    micro.row(micro.CONFIG, grid, text, i)
    for i, (grid, text) in enumerate([((4, 4), (3, 4)), ((6, 10), (1, 2)), ((2, 6), (2, 5))])
]
IDS = np.array([5, 900, 12])
T = 7
ENDS = tuple(range(0, 67, 6))  # so many that completions end at different lengths
RANDOM = Sampling(temperature=3.0, top_k=40, top_p=0.95)  # hot: a tied model repeats itself


@pytest.fixture(scope="module")
def policy():
    return split_policy(micro.model(seed=2))


def draw(policy, rows, ids, *, sampling, group=2, ends=ENDS, key=0, limit=None, **padding):
    definition, params, rest = policy
    prompts = micro.collate(micro.CONFIG, rows, **padding)

    @jax.jit
    def run(params, prompts, ids, key):
        model = nnx.merge(definition, params, rest)
        return rollout(
            model,
            prompts,
            model.embed(prompts),
            ids,
            key,
            num_completions=group,
            max_new_tokens=T,
            end_tokens=ends,
            sampling=sampling,
            limit=limit,
        )

    return jax.device_get(run(params, prompts, ids, jax.random.key(key)))


@pytest.fixture(scope="module")
def drawn(policy):
    return draw(policy, ROWS, IDS, sampling=RANDOM)


def full_forward(policy, tokens):
    """Logits before each completion token, [B, G, T, V], from plain passes over all rows."""
    definition, params, rest = policy
    prompts = micro.collate(micro.CONFIG, ROWS)
    b, g, t = tokens.shape

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(definition, params, rest)
        prompt = model.embed(prompts)
        both = [
            jnp.repeat(prompt, g, axis=0),
            model.language.embed_tokens(tokens.reshape(b * g, t)),
        ]
        n = np.repeat(prompts.length, g)[:, None]
        p = prompt.shape[1]
        along = np.arange(p + t)
        # Completions follow their prompts at once; the padding goes to the end.
        source = np.where(along < n, along, np.minimum(along - n + p, p + t - 1))
        sequence = jnp.take_along_axis(jnp.concatenate(both, axis=1), source[..., None], axis=1)
        after = np.repeat(prompts.next_position, g)[:, None] + along - n
        prompt_positions = np.pad(prompts.positions, ((0, 0), (0, 0), (0, t)))
        positions = np.where(
            (along < n)[:, None], np.repeat(prompt_positions, g, axis=0), after[:, None]
        )
        hidden, _ = model.language.prefill(sequence, positions, along < n + t)
        before = (n - 1 + np.arange(t))[..., None]
        z = logits(jnp.take_along_axis(hidden, before, axis=1), model.language.head)
        return z.reshape(b, g, t, -1)

    return np.asarray(run(params, tokens))


def test_shape_of_a_rollout(drawn):
    """Lengths count the end token; all behind it is the first end token at log-prob 0."""
    ended = np.isin(drawn.tokens, ENDS)
    first = np.where(ended.any(-1), ended.argmax(-1) + 1, T)
    np.testing.assert_array_equal(drawn.lengths, first)
    inside = np.arange(T) < drawn.lengths[..., None]
    assert (drawn.tokens[~inside] == ENDS[0]).all() and (drawn.log_probs[~inside] == 0).all()
    assert (drawn.log_probs[inside] < 0).all()
    np.testing.assert_array_equal(drawn.ended, ended.any(-1))
    assert len(np.unique(drawn.lengths)) > 2, "the test needs ragged completions"
    assert (drawn.tokens[:, 0] != drawn.tokens[:, 1]).any(-1).all(), "a group must differ"


def test_a_completion_that_is_cut_has_not_ended(policy):
    cut = draw(policy, ROWS, IDS, sampling=RANDOM, ends=(66,))
    assert (~cut.ended & (cut.lengths == T)).any()
    np.testing.assert_array_equal(cut.ended, (cut.tokens == 66).any(-1))


def test_log_probs_are_those_of_the_scoring_pass(policy, drawn):
    model = micro.model(seed=2)
    prompts = micro.collate(micro.CONFIG, ROWS)
    score = nnx.jit(
        lambda m, tokens, lengths: m.score(
            prompts, m.embed(prompts), tokens, lengths, with_queries=True
        )
    )(model, drawn.tokens, drawn.lengths)
    inside = np.arange(T) < drawn.lengths[..., None]
    gap = np.abs(np.asarray(score.log_probs) - drawn.log_probs)[inside]
    assert gap.max() < 1e-5
    # And both are those of raw logits, temperature and cuts left out.
    z = torch.tensor(full_forward(policy, drawn.tokens)).log_softmax(-1).numpy()
    taken = np.take_along_axis(z, drawn.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(taken[inside], drawn.log_probs[inside], atol=1e-5)


def test_greedy_is_the_argmax_of_full_passes(policy):
    greedy = draw(policy, ROWS, IDS, sampling=GREEDY, ends=(66,))
    expected = full_forward(policy, greedy.tokens).argmax(-1)
    inside = np.arange(T) < greedy.lengths[..., None]
    np.testing.assert_array_equal(greedy.tokens[inside], expected[inside])
    np.testing.assert_array_equal(greedy.tokens[:, 0], greedy.tokens[:, 1])
    assert inside.sum() > 3 * T


def test_repetition_penalty_counts_prompt_and_completion(policy):
    """Greedy, so that each step shows; padding and image tokens of others count for nobody."""
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.4)
    penalised = draw(policy, ROWS, IDS, sampling=sampling, ends=(66,), more_tokens=3)
    z = full_forward(policy, penalised.tokens)
    processor = RepetitionPenaltyLogitsProcessor(1.4)
    for i, g in np.ndindex(penalised.lengths.shape):
        for t in range(penalised.lengths[i, g]):
            past = np.append(ROWS[i].tokens, penalised.tokens[i, g, :t])
            scores = processor(torch.tensor(past)[None].long(), torch.tensor(z[i, g, t])[None])
            assert penalised.tokens[i, g, t] == int(scores.argmax())
    plain = draw(policy, ROWS, IDS, sampling=GREEDY, ends=(66,))
    assert (plain.tokens != penalised.tokens).any(), "the penalty must matter here"
    # The log-probs stay those of the raw logits.
    raw = torch.tensor(z).log_softmax(-1).numpy()
    taken = np.take_along_axis(raw, penalised.tokens[..., None], -1)[..., 0]
    inside = np.arange(T) < penalised.lengths[..., None]
    np.testing.assert_allclose(taken[inside], penalised.log_probs[inside], atol=1e-5)


def test_completions_do_not_depend_on_the_batch(policy, drawn):
    """Another order, other neighbours, other padding, a larger group: the same completions."""
    order = [2, 0]
    other = draw(
        policy, [ROWS[i] for i in order], IDS[order], sampling=RANDOM, group=3, more_tokens=4
    )
    np.testing.assert_array_equal(other.tokens[:, :2], drawn.tokens[order])
    np.testing.assert_array_equal(other.lengths[:, :2], drawn.lengths[order])
    np.testing.assert_allclose(other.log_probs[:, :2], drawn.log_probs[order], atol=1e-5)


def test_another_key_or_sample_draws_other_completions(policy, drawn):
    for ids, key in ((IDS, 1), (IDS + 1, 0)):
        other = draw(policy, ROWS, ids, sampling=RANDOM, key=key)
        assert (other.tokens != drawn.tokens).any(-1).mean() > 0.5


def test_a_limit_cuts_each_prompts_completions(policy, drawn):
    limit = np.array([2, 1, T + 3])
    cut = draw(policy, ROWS, IDS, sampling=RANDOM, limit=limit)
    lengths = np.minimum(drawn.lengths, limit[:, None])
    assert (lengths < drawn.lengths).any()
    np.testing.assert_array_equal(cut.lengths, lengths)
    np.testing.assert_array_equal(cut.ended, drawn.ended & (drawn.lengths <= limit[:, None]))
    kept = np.arange(T) < lengths[..., None]
    np.testing.assert_array_equal(cut.tokens, np.where(kept, drawn.tokens, ENDS[0]))
    np.testing.assert_array_equal(cut.log_probs, np.where(kept, drawn.log_probs, 0.0))


def test_limits_ends_and_temperature_compile_nothing(policy, drawn):
    definition, params, rest = policy
    prompts = micro.collate(micro.CONFIG, ROWS)

    @jax.jit
    def run(params, temperature, ends, limit):
        model = nnx.merge(definition, params, rest)
        return rollout(
            model,
            prompts,
            model.embed(prompts),
            IDS,
            jax.random.key(0),
            num_completions=2,
            max_new_tokens=T,
            end_tokens=ends,
            sampling=RANDOM.replace(temperature=temperature),
            limit=limit,
        )

    ends = np.array(ENDS, np.int32)
    unlimited = run(params, 3.0, ends, np.full(3, T))
    jax.tree.map(np.testing.assert_array_equal, unlimited.tokens, drawn.tokens)

    limit = np.array([2, 5, 1])
    limited = run(params, 3.0, ends, limit)
    np.testing.assert_array_equal(limited.lengths, np.minimum(drawn.lengths, limit[:, None]))

    cold = jax.device_get(run(params, 1e-3, np.full_like(ends, 66), np.full(3, T)))
    greedy = draw(policy, ROWS, IDS, sampling=GREEDY, ends=(66,))
    np.testing.assert_array_equal(cold.tokens, greedy.tokens)
    assert run._cache_size() == 1


def test_every_prompt_has_its_own_temperature(policy, drawn):
    mixed = np.array([[3.0], [1e-3], [3.0]])
    other = draw(policy, ROWS, IDS, sampling=RANDOM.replace(temperature=mixed))
    greedy = draw(policy, ROWS, IDS, sampling=GREEDY)
    np.testing.assert_array_equal(other.tokens[[0, 2]], drawn.tokens[[0, 2]])
    np.testing.assert_array_equal(other.tokens[1], greedy.tokens[1])


def test_queries_go_on_from_the_caches(policy):
    """`encode_queries` with caches equals a second pass over prompt and completion."""
    definition, params, rest = policy
    prompts = micro.collate(micro.CONFIG, ROWS, more_tokens=2)

    @jax.jit
    def both(params):
        model = nnx.merge(definition, params, rest)
        embedded = model.embed(prompts)
        written, caches = generate(
            model,
            prompts,
            embedded,
            IDS,
            jax.random.key(0),
            num_completions=2,
            max_new_tokens=T,
            end_tokens=ENDS,
            sampling=RANDOM,
        )
        tokens, lengths = written.tokens, written.lengths
        again = model.hidden_states(prompts, embedded, tokens, lengths, with_queries=True)[1]
        return (
            written,
            model.encode_queries(prompts, embedded, tokens, lengths, caches),
            again[:, :, T:],
        )

    written, ours, expected = both(params)
    micro.close(ours, expected, 1e-5)
    ragged = np.unique(written.lengths)
    assert ragged[0] == 1 and ragged[-1] == T and len(ragged) > 2, ragged


@pytest.mark.parametrize("ends", [ENDS, tuple(range(67))])
def test_the_loop_stops_when_all_have_ended(policy, monkeypatch, ends):
    steps = []
    decode = LanguageModel.decode

    def counting(self, token, position, index, *caches):
        jax.debug.callback(lambda i: steps.append(int(i)), index)
        return decode(self, token, position, index, *caches)

    monkeypatch.setattr(LanguageModel, "decode", counting)
    out = draw(policy, ROWS, IDS, sampling=RANDOM, ends=ends)
    jax.effects_barrier()
    # The first token comes from the prompt's pass, and nothing follows the last one.
    assert sorted(steps) == list(range(out.lengths.max() - 1))
    assert len(ends) < 67 or not steps
