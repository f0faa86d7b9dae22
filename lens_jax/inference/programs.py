"""The compiled programs of inference and evaluation: generate, encode queries, decode masks."""

from functools import partial

import jax
from flax import nnx
from jaxtyping import Array

from lens_jax.models.inputs import Prompts
from lens_jax.rollout import sampler

COMPLETION_BUCKET = 32  # completions take a multiple of so many tokens


@partial(jax.jit, static_argnames=("definition", "max_new_tokens"))
def generate(
    state, prompts: Prompts, sample_id, key, sampling, ends, limit, *, definition, max_new_tokens
) -> tuple[sampler.Rollout, Array, Array | None]:
    """Completions, the embedded prompts, and the queries' hidden states if the caches serve them.

    The caches do where the queries have the rollout's positions; otherwise all is read again.
    """
    model = nnx.merge(definition, state)
    embedded = model.embed(prompts)
    rollout, caches = sampler.generate(
        model,
        prompts,
        embedded,
        sample_id,
        key,
        num_completions=1,
        max_new_tokens=max_new_tokens,
        end_tokens=ends,
        sampling=sampling,
        limit=limit,
    )
    hidden = None
    if model.config.context_positions == "mrope":
        hidden = model.encode_queries(prompts, embedded, rollout.tokens, rollout.lengths, caches)
    return rollout, embedded, hidden


@partial(jax.jit, static_argnames=("definition",))
def encode_queries(
    state, prompts: Prompts, embedded: Array | None, tokens, lengths, *, definition
) -> Array:
    """The queries' hidden states [B, 1, Q, D] after completions [B, T].

    `embedded` holds the prompts as `generate` returns them; None: they are embedded here.
    """
    model = nnx.merge(definition, state)
    embedded = model.embed(prompts) if embedded is None else embedded
    return model.encode_queries(prompts, embedded, tokens[:, None], lengths[:, None])


@partial(jax.jit, static_argnames=("definition",))
def decode_masks(state, sam_pixels, hidden, *, definition) -> tuple[Array, Array]:
    """SAM's prompt token [B, E] and mask logits [B, h, w] from the queries' hidden states.

    All that it reads of the prompts is SAM's pixels [B, A, A, 3], of one size whatever the prompts'
    buckets: it is compiled once for a number of rows.
    """
    model = nnx.merge(definition, state)
    features = model.sam.encode(model.sam.normalize(sam_pixels))
    masks = model.decode_masks(features, hidden, stability=True)
    return model.context(hidden)[:, 0], masks.logits[:, 0]


def bucket_length(length: int) -> int:
    """The number of tokens that completions of up to `length` are padded to."""
    return -(-length // COMPLETION_BUCKET) * COMPLETION_BUCKET


def bucket_rows(rows: int, parts: int = 1) -> int:
    """The number of rows that are decoded for so many: 1, 2, 4, 8, ... in each of `parts`.

    Few numbers of rows make few compiled programs.
    """
    return parts << (-(-rows // parts) - 1).bit_length()
