"""Qwen2's decoder with multimodal rotary positions: packed groups, prompts, single tokens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from lens_jax.models import layers
from lens_jax.models.attention import Prefix, cached_attention, heads_first
from lens_jax.models.long_attention import XLA, Attention
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.rope import Rotation, multimodal_rotation, rotate


@struct.dataclass
class PromptCache:
    """Keys and values of the prompts, per layer, shared by all completions of a group."""

    keys: Float[Array, "layers B K P H"]
    values: Float[Array, "layers B K P H"]
    mask: Bool[Array, "B P"]

    def layer(self, index) -> Prefix:
        return Prefix(_pick(self.keys, index), _pick(self.values, index), self.mask)


@struct.dataclass
class CompletionCache:
    """Keys and values of the completions so far."""

    keys: Float[Array, "layers B K G T H"]
    values: Float[Array, "layers B K G T H"]

    def layer(self, index) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T H"]]:
        return _pick(self.keys, index), _pick(self.values, index)


class DecoderLayer(nnx.Module):
    """Pre-norm grouped-query attention and SwiGLU; the caller attends between the two halves."""

    def __init__(self, config: QwenVLConfig, **options: Any):
        width, mlp, self.head_dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = (n * self.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.input_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **options)
        self.post_attention_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **options)
        self.q_proj = layers.linear(width, heads, **options)
        self.k_proj = layers.linear(width, kv_heads, **options)
        self.v_proj = layers.linear(width, kv_heads, **options)
        options["use_bias"] = False
        self.o_proj = layers.linear(heads, width, **options)
        self.gate_proj = layers.linear(width, mlp, wide=True, **options)
        self.up_proj = layers.linear(width, mlp, wide=True, **options)
        self.down_proj = layers.linear(mlp, width, **options)

    def project(
        self, x: Float[Array, "... L D"], rotation: Rotation
    ) -> tuple[Float[Array, "... L N H"], Float[Array, "... L K H"], Float[Array, "... L K H"]]:
        """Queries, keys (both rotated) and values."""
        h = self.input_norm(x)
        heads = (*x.shape[:-1], -1, self.head_dim)
        queries = rotate(self.q_proj(h).reshape(heads), rotation)
        keys = rotate(self.k_proj(h).reshape(heads), rotation)
        return queries, keys, self.v_proj(h).reshape(heads)

    def combine(
        self, x: Float[Array, "... L D"], attended: Float[Array, "... L N H"]
    ) -> Float[Array, "... L D"]:
        """The residual stream after attention and MLP."""
        x = x + self.o_proj(attended.reshape(*x.shape[:-1], -1))
        h = self.post_attention_norm(x)
        return x + self.down_proj(jax.nn.silu(self.gate_proj(h)) * self.up_proj(h))


class LanguageModel(nnx.Module):
    """Embeddings in, hidden states after the final norm out; logits are `head.py`'s business."""

    def __init__(
        self,
        config: QwenVLConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: Attention = XLA,
    ):
        self.config, self.attention = config, attention
        table = dict(num_embeddings=config.vocab_size, features=config.hidden_size, dtype=dtype)
        self.embed_tokens = nnx.Embed(**table, rngs=rngs)
        self.layers = layers.stack(
            lambda rngs: DecoderLayer(config, rngs=rngs, dtype=dtype), config.num_layers, rngs
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, rngs=rngs
        )
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Embed(**table, rngs=rngs)

    @property
    def head(self) -> Float[Array, "V D"]:
        """Output embeddings, tied or not."""
        tied = self.config.tie_word_embeddings
        return (self.embed_tokens if tied else self.lm_head).embedding[...]

    def rotation(self, positions: Int[Array, "... 3 L"]) -> Rotation:
        config = self.config
        return multimodal_rotation(
            positions, config.head_dim, config.rope_theta, config.mrope_section
        )

    def prefill(
        self,
        prompt: Float[Array, "B P D"],
        positions: Int[Array, "B 3 P"],
        mask: Bool[Array, "B P"],
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "B P D"], PromptCache]:
        """Runs right-padded prompts; returns hidden states and the keys a group will share."""
        rotation = self.rotation(positions)
        attend = partial(self.attention.packed, valid=mask, prompt=prompt.shape[1], group=0)

        def step(layer, x):
            queries, keys, values = layer.project(x, rotation)
            cached = heads_first(keys), heads_first(values)
            return layer.combine(x, attend(queries, keys, values)), cached

        x, (keys, values) = layers.scan(self.layers, step, prompt, remat=remat)
        return self.norm(x), PromptCache(keys, values, mask)

    def packed(
        self,
        prompt: Float[Array, "B P D"],
        own: Float[Array, "B G S D"],
        positions: Int[Array, "B 3 P"],
        own_positions: Int[Array, "B G S"],
        mask: Bool[Array, "B P"],
        own_mask: Bool[Array, "B G S"],
        *,
        remat: str = "none",
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B G S D"]]:
        """One pass over `[prompt | own_1 | … | own_G]`, the prompt computed once per group.

        Members see the whole prompt and, causally, what is valid of themselves; never each other.
        """
        b, p, d = prompt.shape
        g, s = own.shape[1:3]
        flat = own_positions.reshape(b, 1, g * s)
        rotation = self.rotation(
            jnp.concatenate([positions, jnp.broadcast_to(flat, (b, 3, g * s))], axis=-1)
        )
        valid = jnp.concatenate([mask, own_mask.reshape(b, g * s)], axis=1)
        attend = partial(self.attention.packed, valid=valid, prompt=p, group=g)

        def step(layer, x):
            return layer.combine(x, attend(*layer.project(x, rotation))), None

        x = jnp.concatenate([prompt, own.reshape(b, g * s, d)], axis=1)
        x, _ = layers.scan(self.layers, step, x, remat=remat)
        x = self.norm(x)
        return x[:, :p], x[:, p:].reshape(b, g, s, d)

    def extend(
        self,
        own: Float[Array, "B G S D"],
        own_positions: Int[Array, "B G S"],
        mask: Bool[Array, "B G S C+S"],
        prompt: PromptCache,
        past: CompletionCache | None = None,
        *,
        remat: str = "none",
    ) -> Float[Array, "B G S D"]:
        """Hidden states of tokens that follow what `prefill` and `decode` have read.

        The same numbers as `packed` gives, but a gradient with respect to `own` stops at the cache.

        Args:
            mask: what each token sees of the C cached ones of its completion (`past`; none
                without it), and then of its own kind.
        """
        b, g, s = own_positions.shape
        rotation = self.rotation(jnp.broadcast_to(own_positions[:, :, None], (b, g, 3, s)))

        def step(layer, carry):
            x, index = carry
            queries, *new = layer.project(x, rotation)
            keys, values = map(heads_first, new)
            if past is not None:
                keys, values = (
                    jnp.concatenate([before, y], axis=3)
                    for before, y in zip(past.layer(index), (keys, values), strict=True)
                )
            attended = cached_attention(queries, keys, values, mask, prompt.layer(index))
            return (layer.combine(x, attended), index + 1), None

        (x, _), _ = layers.scan(self.layers, step, (own, jnp.int32(0)), remat=remat)
        return self.norm(x)

    def empty_cache(self, batch: int, group: int, length: int) -> CompletionCache:
        config = self.config
        shape = (config.num_layers, batch, config.num_kv_heads, group, length, config.head_dim)
        zeros = jnp.zeros(shape, self.embed_tokens.dtype)
        return CompletionCache(zeros, zeros)

    def decode(
        self,
        token: Float[Array, "B G D"],
        position: Int[Array, "B"],
        index: Int[Array, ""],
        prompt: PromptCache,
        cache: CompletionCache,
    ) -> tuple[Float[Array, "B G D"], CompletionCache]:
        """One step: token `index` of every completion, at rotary position `position`."""
        length = cache.keys.shape[4]
        mask = (jnp.arange(length) <= index)[None, None, None]
        rotation = self.rotation(
            jnp.broadcast_to(position[:, None, None, None], (*position.shape, 1, 3, 1))
        )
        write = lambda stack, new, i: lax.dynamic_update_slice(  # noqa: E731
            stack, heads_first(new)[None].astype(stack.dtype), (i, 0, 0, 0, index, 0)
        )

        def step(i, carry):
            x, keys, values = carry
            layer = layers.layer(self.layers, i)
            query, key, value = layer.project(x, rotation)
            keys, values = write(keys, key, i), write(values, value, i)
            own = CompletionCache(keys, values).layer(i)
            attended = cached_attention(query, *own, mask, prompt.layer(i))
            return layer.combine(x, attended), keys, values

        # The loop carries the cache, so that it is updated in place; a scan would copy it.
        carry = (token[:, :, None], cache.keys, cache.values)
        x, keys, values = lax.fori_loop(0, self.config.num_layers, step, carry)
        return self.norm(x)[:, :, 0], CompletionCache(keys, values)


def _pick(stack, index):
    return lax.dynamic_index_in_dim(stack, index, keepdims=False)
