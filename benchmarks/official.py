"""The layout of the official system, to compare with: a group as G full sequences.

Every completion has its own copy of the prompt and of the image, through the vision tower and
through SAM's encoder, and logits are computed at every position: `[prompt | completion | queries]`
with queries, `[prompt | completion]` for the reference. Modules and losses are the product's.

It is part of benchmarks/update.py, whose --help says what is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensModel, Score
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.sam.mask_decoder import SamMasks
from lens_jax.models.sam.segmenter import SamFeatures


class OfficialLayout:
    """Stands in for a model in `grpo.sums`: the same numbers, every group computed G times."""

    def __init__(self, model: LensModel, group: int):
        self.model, self.group = model, group

    def copies(self, prompts: Prompts) -> Prompts:
        """Each row G times."""
        return jax.tree.map(lambda x: jnp.repeat(x, self.group, axis=0), prompts)

    def embed(self, prompts: Prompts) -> Float[Array, "B*G P D"]:
        return self.model.embed(self.copies(prompts))

    def sam_features(self, prompts: Prompts) -> SamFeatures:
        return self.model.sam_features(self.copies(prompts))

    def decode_masks(
        self, features: SamFeatures, hidden: Float[Array, "B G M D"], *, stability: bool
    ) -> SamMasks:
        alone = hidden.reshape(-1, 1, *hidden.shape[2:])
        masks = self.model.decode_masks(features, alone, stability=stability)
        return jax.tree.map(lambda x: x.reshape(*hidden.shape[:2], *x.shape[2:]), masks)

    def score(
        self,
        prompts: Prompts,
        embedded: Float[Array, "B*G P D"],
        completions: Int[Array, "B G T"],
        lengths: Int[Array, "B G"],
        *,
        with_queries: bool,
        positions: str | None = None,
    ) -> Score:
        """As `LensModel.score`, over full sequences with full logits."""
        model, shape = self.model, completions.shape
        prompts = self.copies(prompts)
        tokens, lengths = completions.reshape(-1, shape[2]), lengths.reshape(-1)
        n, p, t = *prompts.tokens.shape, shape[2]

        scheme = positions or model.config.context_positions
        if scheme == "mrope":
            before, first = prompts.positions, prompts.next_position
        else:
            before = jnp.broadcast_to(jnp.arange(p), (n, 3, p))
            first = prompts.length
        parts = [embedded, model.language.embed_tokens(tokens)]
        offsets = jnp.broadcast_to(jnp.arange(t), (n, t))
        valid = [jnp.arange(p) < prompts.length[:, None], offsets < lengths[:, None]]
        if with_queries:
            queries = model.context.queries[...].astype(embedded.dtype)
            m = len(queries)
            parts.append(jnp.broadcast_to(queries, (n, *queries.shape)))
            offsets = jnp.concatenate([offsets, lengths[:, None] + jnp.arange(m)], axis=1)
            valid.append(jnp.ones((n, m), bool))
        after = jnp.broadcast_to((first[:, None] + offsets)[:, None], (n, 3, offsets.shape[1]))
        hidden, _ = model.language.prefill(
            jnp.concatenate(parts, axis=1),
            jnp.concatenate([before, after], axis=2),
            jnp.concatenate(valid, axis=1),
        )

        log_probs = jax.nn.log_softmax(logits(hidden, model.language.head))
        ahead = jnp.concatenate(
            [prompts.length[:, None] - 1, p + jnp.tile(jnp.arange(t - 1), (n, 1))], 1
        )
        log_probs = jnp.take_along_axis(log_probs, ahead[..., None], axis=1)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        taken = jnp.take_along_axis(log_probs, tokens[..., None], axis=2)[..., 0]
        read = hidden[:, p + t :].reshape(*shape[:2], -1, hidden.shape[-1])
        return Score(taken.reshape(shape), entropy.reshape(shape), read if with_queries else None)
