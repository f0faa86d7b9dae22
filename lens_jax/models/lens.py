"""LENS: a vision-language model that reasons in text, context queries that read it, SAM for masks.

A group of G completions of one prompt is scored in a single packed pass: the prompt, the image's
patches and SAM's features are computed once; only completions, queries and the mask decoder run
for every completion.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from lens_jax.distribution.axes import ParameterAxes
from lens_jax.models.context import ContextModule
from lens_jax.models.inputs import Prompts
from lens_jax.models.layers import shapes_of
from lens_jax.models.long_attention import XLA, Attention
from lens_jax.models.parameters import POLICY, parameter_axes, select
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.qwen_vl.head import token_log_probs
from lens_jax.models.qwen_vl.language import CompletionCache, LanguageModel, PromptCache
from lens_jax.models.qwen_vl.vision import VisionTower
from lens_jax.models.sam.config import Sam2Config, SamConfig
from lens_jax.models.sam.mask_decoder import SamMasks
from lens_jax.models.sam.segmenter import Sam1, Sam2, SamFeatures

POSITION_SCHEMES = ("mrope", "text")


@dataclasses.dataclass(frozen=True)
class LensConfig:
    """Shapes of the whole model.

    `context_positions` is the position scheme of every pass with queries: `mrope` continues Qwen's
    multimodal positions; `text` counts tokens from 0, image tokens included, as the official code
    does and as released checkpoints need.
    """

    mllm: QwenVLConfig
    sam: SamConfig | Sam2Config
    num_queries: int = 64
    connector_depth: int = 4
    connector_heads: int = 16
    context_positions: str = "mrope"

    def __post_init__(self):
        if self.context_positions not in POSITION_SCHEMES:
            raise ValueError(
                f"context_positions: {self.context_positions!r} is none of "
                + ", ".join(POSITION_SCHEMES)
            )

    @property
    def axes(self) -> ParameterAxes:
        """Axes of the parameters, for their layout over devices."""
        return parameter_axes(self.mllm.num_kv_heads)

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Head widths of all that uses `Attention`: language model, vision tower, SAM 2's trunk."""
        sam = self.sam
        trunk = (sam.embed_dim // sam.num_heads,) if isinstance(sam, Sam2Config) else ()
        return self.mllm.head_dim, self.mllm.vision.head_dim, *trunk


@struct.dataclass
class Score:
    """Results of a scoring pass; arbitrary at and after a completion's length."""

    log_probs: Float[Array, "B G T"]
    entropy: Float[Array, "B G T"]
    hidden: Float[Array, "B G Q D"] | None = None  # the queries' hidden states, if they ran


class LensModel(nnx.Module):
    """Vision tower, language model, context module and SAM."""

    def __init__(
        self,
        config: LensConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        remat: str = "none",
        attention: Attention = XLA,
    ):
        self.config = config
        self.remat = remat
        options = dict(rngs=rngs, dtype=dtype, attention=attention)
        self.visual = VisionTower(config.mllm.vision, **options)
        self.language = LanguageModel(config.mllm, **options)
        self.context = ContextModule(
            config.num_queries,
            config.mllm.hidden_size,
            config.sam.d_model,
            depth=config.connector_depth,
            num_heads=config.connector_heads,
            rngs=rngs,
            dtype=dtype,
        )
        if isinstance(config.sam, SamConfig):
            self.sam = Sam1(config.sam, rngs=rngs, dtype=dtype)
        else:
            self.sam = Sam2(config.sam, **options)

    def embed(self, prompts: Prompts) -> Float[Array, "B P D"]:
        """Token embeddings, image tokens replaced by the vision tower's output."""
        merged = self.visual(
            prompts.patches, prompts.patch_positions, prompts.patch_mask, remat=self.remat
        )
        index = prompts.image_index[..., None]
        images = jnp.take_along_axis(merged, jnp.maximum(index, 0), axis=1)
        return jnp.where(index >= 0, images, self.language.embed_tokens(prompts.tokens))

    def score(
        self,
        prompts: Prompts,
        embedded: Float[Array, "B P D"],
        completions: Int[Array, "B G T"],
        lengths: Int[Array, "B G"],
        **options: Any,
    ) -> Score:
        """Log-probabilities of completions and, with queries, the queries' hidden states.

        Arguments and options are those of `hidden_states`.
        """
        b, g, t = completions.shape
        prompt_hidden, hidden = self.hidden_states(
            prompts, embedded, completions, lengths, **options
        )
        last = jnp.take_along_axis(prompt_hidden, prompts.length[:, None, None] - 1, axis=1)
        last = jnp.broadcast_to(last[:, None], (b, g, 1, last.shape[-1]))
        before = jnp.concatenate([last, hidden[:, :, : t - 1]], axis=2)
        log_probs, entropy = token_log_probs(before, self.language.head, completions)
        return Score(log_probs, entropy, hidden[:, :, t:] if hidden.shape[2] > t else None)

    def hidden_states(
        self,
        prompts: Prompts,
        embedded: Float[Array, "B P D"],
        completions: Int[Array, "B G T"],
        lengths: Int[Array, "B G"],
        *,
        with_queries: bool,
        positions: str | None = None,
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B G S D"]]:
        """One packed pass; hidden states of prompts and of completions [+ queries], S = T [+ Q].

        Args:
            embedded: the prompts as `embed` returns them.
            completions: tokens after the prompt, right padded.
            lengths: how many of them count; the end token is one of them.
            with_queries: append the context queries to every completion.
            positions: `mrope` or `text`; the configuration's scheme by default.
        """
        b, g, t = completions.shape
        mask = jnp.arange(prompts.tokens.shape[1]) < prompts.length[:, None]
        prompt_positions, first = self._positions(prompts, positions)
        own = self.language.embed_tokens(completions)
        offsets = jnp.broadcast_to(jnp.arange(t), (b, g, t))
        valid = offsets < lengths[..., None]
        if with_queries:
            queries = self._queries(b, g, own.dtype)
            q = queries.shape[2]
            own = jnp.concatenate([own, queries], axis=2)
            offsets = jnp.concatenate([offsets, lengths[..., None] + jnp.arange(q)], axis=2)
            valid = jnp.concatenate([valid, jnp.ones((b, g, q), bool)], axis=2)
        return self.language.packed(
            embedded,
            own,
            prompt_positions,
            first[:, None, None] + offsets,
            mask,
            valid,
            remat=self.remat,
        )

    def encode_queries(
        self,
        prompts: Prompts,
        embedded: Float[Array, "B P D"],
        completions: Int[Array, "B G T"],
        lengths: Int[Array, "B G"],
        caches: tuple[PromptCache, CompletionCache] | None = None,
    ) -> Float[Array, "B G Q D"]:
        """The queries' hidden states after given completions, in a pass of the queries alone.

        It gives the numbers of `hidden_states`, but training the queries differentiates Q tokens
        instead of the whole sequence.

        Args:
            caches: those of the rollout that sampled the completions, which then need not run
                again. They hold the rollout's positions: the scheme must be `mrope`. Without
                caches G is 1.
        """
        b, g, t = completions.shape
        queries = self._queries(b, g, embedded.dtype)
        if caches is None:
            prompt, first = self._read(prompts, embedded, completions[:, 0], lengths[:, 0])
            past, own, start = None, queries, lengths
            sees = [jnp.tri(queries.shape[2], dtype=bool)[None, None]]
        else:
            # No step of decoding has read a completion's last token.
            prompt, past = caches
            first, start = prompts.next_position, lengths - 1
            last = jnp.take_along_axis(completions, start[..., None], axis=2)
            own = jnp.concatenate([self.language.embed_tokens(last), queries], axis=2)
            s = own.shape[2]
            before = jnp.arange(t) < start[..., None, None]
            sees = [jnp.broadcast_to(x, (b, g, s, x.shape[-1])) for x in (before, jnp.tri(s) > 0)]
        hidden = self.language.extend(
            own,
            first[:, None, None] + (start[..., None] + jnp.arange(own.shape[2])),
            jnp.concatenate(sees, axis=-1),
            prompt,
            past,
            remat=self.remat,
        )
        return hidden if past is None else hidden[:, :, 1:]

    def _read(
        self,
        prompts: Prompts,
        embedded: Float[Array, "B P D"],
        completion: Int[Array, "B T"],
        length: Int[Array, "B"],
    ) -> tuple[PromptCache, Int[Array, "B"]]:
        """Keys and values of prompts with their completions; the first positions after prompts."""
        b, t = completion.shape
        prompt_positions, first = self._positions(prompts)
        own_positions = jnp.broadcast_to((first[:, None] + jnp.arange(t))[:, None], (b, 3, t))
        valid = [
            jnp.arange(embedded.shape[1]) < prompts.length[:, None],
            jnp.arange(t) < length[:, None],
        ]
        _, cache = self.language.prefill(
            jnp.concatenate([embedded, self.language.embed_tokens(completion)], axis=1),
            jnp.concatenate([prompt_positions, own_positions], axis=2),
            jnp.concatenate(valid, axis=1),
            remat=self.remat,
        )
        return cache, first

    def _queries(self, b: int, g: int, dtype) -> Float[Array, "b g Q D"]:
        queries = self.context.queries[...].astype(dtype)
        return jnp.broadcast_to(queries, (b, g, *queries.shape))

    def _positions(
        self, prompts: Prompts, scheme: str | None = None
    ) -> tuple[Int[Array, "B 3 P"], Int[Array, "B"]]:
        """Rotary positions of the prompts' tokens, and the first one after each prompt."""
        if (scheme or self.config.context_positions) == "mrope":
            return prompts.positions, prompts.next_position
        b, p = prompts.tokens.shape
        return jnp.broadcast_to(jnp.arange(p), (b, 3, p)), prompts.length

    def sam_features(self, prompts: Prompts) -> SamFeatures:
        """SAM's image features, once for each image."""
        return self.sam.encode(self.sam.normalize(prompts.sam_pixels))

    def decode_masks(
        self, features: SamFeatures, hidden: Float[Array, "B G Q D"], *, stability: bool
    ) -> SamMasks:
        """Masks from the queries' hidden states; `stability`: the multimask rule of evaluation."""
        token = self.context(hidden)[:, :, None]
        return self.sam.decode(features, token, stability=stability)


def abstract(config: LensConfig, dtype=jnp.float32, **options: Any) -> LensModel:
    """The model without memory: shapes only. Options are those of `LensModel`."""
    return nnx.merge(*_abstract(config, dtype, **options), copy=True)


@functools.lru_cache(16)
def _abstract(config: LensConfig, dtype, **options: Any) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(shapes_of(lambda rngs: LensModel(config, rngs=rngs, dtype=dtype, **options)))


def split_policy(model: LensModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Definition, the parameters that read and generate text, and the rest (context module, SAM).

    Sampling and the reference need the policy alone: merged with the shapes of the rest, it makes
    a model that can `embed` and `score`.
    """
    return nnx.split(model, select(POLICY), ...)
