"""Rollout: completions of a batch of prompts, in one compiled program.

The prompt runs once; its keys serve all completions of the group. Decoding is a loop on the device
that stops when every completion has ended.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct
from jax import lax, nn
from jaxtyping import Array, Bool, Float, Int

from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensModel
from lens_jax.models.qwen_vl.head import logits as all_logits
from lens_jax.models.qwen_vl.language import CompletionCache, PromptCache
from lens_jax.rollout.sampling import Sampling, penalize, row_keys, sample


@struct.dataclass
class Rollout:
    """Completions, right padded with the first end token; `lengths` count a sampled end token.

    `log_probs` are those of the raw logits (no temperature, whole vocabulary), as scoring computes
    them; 0 past the length. `ended` is False where the limit cut a completion.
    """

    tokens: Int[Array, "B G T"]
    lengths: Int[Array, "B G"]
    log_probs: Float[Array, "B G T"]
    ended: Bool[Array, "B G"]


def rollout(*args, **options) -> Rollout:
    """Samples completions; arguments as for `generate`."""
    return generate(*args, **options)[0]


def generate(
    model: LensModel,
    prompts: Prompts,
    embedded: Float[Array, "B P D"],
    sample_id: Int[Array, "B"],
    key: Array,
    *,
    num_completions: int,
    max_new_tokens: int,
    end_tokens: Sequence[int] | Int[Array, "E"],
    sampling: Sampling,
    limit: Int[Array, "B"] | None = None,
    together: Sequence[str] = (),
) -> tuple[Rollout, tuple[PromptCache, CompletionCache]]:
    """Samples `num_completions` (G) completions of at most `max_new_tokens` (T) tokens a prompt.

    `embedded` holds the prompts as `model.embed` returns them. Positions are Qwen's multimodal
    ones. Keys fold in sample, completion and token, so that a completion does not depend on what
    else is in the batch. The caches returned with the completions, for `model.encode_queries`,
    hold every token but the last of each.

    Args:
        end_tokens: each of them ends a completion; the first one pads it. May be traced.
        limit: cuts each prompt's completions short of T; at least 1. May be traced.
        together: mesh axes of the surrounding shard_map whose devices stop at the same step, as
            they must if a step holds collectives.
    """
    language = model.language
    b, p = prompts.tokens.shape
    shape = (b, num_completions)
    mask = jnp.arange(p) < prompts.length[:, None]
    hidden, prompt_cache = language.prefill(embedded, prompts.positions, mask)
    last = jnp.take_along_axis(hidden, prompts.length[:, None, None] - 1, axis=1)
    keys = row_keys(key, sample_id, num_completions)
    ends = jnp.asarray(end_tokens, jnp.int32)
    limit = jnp.minimum(max_new_tokens, max_new_tokens if limit is None else limit)
    limit = jnp.broadcast_to(limit, b)
    penalty = sampling.repetition_penalty
    rows = jnp.arange(b)[:, None, None], jnp.arange(num_completions)[None, :, None]

    def append(hidden, index, out, seen):
        """Adds token `index` to the completions that go on."""
        z = all_logits(hidden, language.head)
        chosen_from = z if penalty == 1.0 else penalize(z, seen, penalty)
        token = sample(chosen_from, keys, index, sampling)
        taken = jnp.take_along_axis(z, token[..., None], axis=-1)[..., 0]
        log_prob = taken - nn.logsumexp(z, axis=-1)
        if penalty != 1.0:
            seen = seen.at[(*rows, token[..., None])].set(True)
        over = out.ended | (index >= limit)[:, None]
        out = Rollout(
            tokens=out.tokens.at[:, :, index].set(jnp.where(over, ends[0], token)),
            lengths=out.lengths + ~over,
            log_probs=out.log_probs.at[:, :, index].set(jnp.where(over, 0.0, log_prob)),
            ended=out.ended | (~over & jnp.isin(token, ends)),
        )
        return out, seen

    def step(state):
        index, cache, out, seen, _ = state
        token = lax.dynamic_index_in_dim(out.tokens, index, axis=2, keepdims=False)
        embedded = language.embed_tokens(token)
        position = prompts.next_position + index
        hidden, cache = language.decode(embedded, position, index, prompt_cache, cache)
        out, seen = append(hidden, index + 1, out, seen)
        return index + 1, cache, out, seen, unfinished(index + 1, out)

    def unfinished(index, out):
        here = ~jnp.all(out.ended | (index + 1 >= limit)[:, None])
        return lax.pmax(here.astype(jnp.int32), together) > 0 if together else here

    seen = None
    if penalty != 1.0:
        seen = jnp.zeros((*shape, language.config.vocab_size), bool)
        prompt_rows = jnp.broadcast_to(prompts.tokens[:, None], (*shape, p))
        # Padding repeats the last token: nothing is marked that the prompt does not hold.
        ends_at = jnp.minimum(jnp.arange(p), prompts.length[:, None] - 1)[:, None]
        seen = seen.at[(*rows, jnp.take_along_axis(prompt_rows, ends_at, axis=2))].set(True)
    empty = Rollout(
        tokens=jnp.full((*shape, max_new_tokens), ends[0]),
        lengths=jnp.zeros(shape, jnp.int32),
        log_probs=jnp.zeros((*shape, max_new_tokens), jnp.float32),
        ended=jnp.zeros(shape, bool),
    )
    start = jnp.broadcast_to(last, (*shape, last.shape[-1]))
    cache = language.empty_cache(*shape, max_new_tokens)
    first = jnp.int32(0)
    out, seen = append(start, first, empty, seen)
    state = first, cache, out, seen, unfinished(first, out)
    _, cache, out, _, _ = lax.while_loop(lambda state: state[-1], step, state)
    return out, (prompt_cache, cache)
