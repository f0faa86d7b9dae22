"""The mask decoder of SAM 1 and SAM 2: a two-way transformer between prompt tokens and the image.

Everything before the first image-to-token attention is the same for all prompts of an image, so
image arrays enter with a prompt axis of length 1 and get their own values only there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from lens_jax.models.layers import gelu, layer_norm, linear
from lens_jax.models.sam.config import DecoderConfig, Sam2Config
from lens_jax.models.sam.layers import Mlp, Upscale2x

TRANSFORMER_EPSILON = 1e-5  # PyTorch's default; the upscaling path has 1e-6

HighRes = tuple[Float[Array, "B 4*h 4*w C//8"], Float[Array, "B 2*h 2*w C//4"]]


@struct.dataclass
class SamMasks:
    """Masks of each prompt, one for every mask token, of which one is selected.

    `logits` (float32, a quarter of the image's side) is the mask of `selected_token`; `iou` the
    predicted quality of every token's mask, `object_score` the logit that there is an object at
    all, `stability` the share of token 0's mask that survives a small shift of the threshold. SAM 1
    has neither of the last two.
    """

    logits: Float[Array, "B G h w"]
    selected_token: Int[Array, "B G"]
    all_logits: Float[Array, "B G K h w"]
    iou: Float[Array, "B G K"]
    object_score: Float[Array, "B G"] | None = None
    stability: Float[Array, "B G"] | None = None


class NarrowAttention(nnx.Module):
    """Multi-head attention whose inner width may be smaller than its outer one.

    The prompt axis (second) of queries or of keys and values may be 1: then it is shared.
    """

    def __init__(self, dim: int, heads: int, downsample_rate: int = 1, **options: Any):
        self.heads, inner = heads, dim // downsample_rate
        self.q_proj = linear(dim, inner, **options)
        self.k_proj = linear(dim, inner, **options)
        self.v_proj = linear(dim, inner, **options)
        self.out_proj = linear(inner, dim, **options)

    def __call__(
        self,
        q: Float[Array, "B #G Q C"],
        k: Float[Array, "B #G S C"],
        v: Float[Array, "B #G S C"],
    ) -> Float[Array, "B G Q C"]:
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (y.reshape(*y.shape[:3], self.heads, -1) for y in (q, k, v))
        scores = jnp.einsum("bgqhd,bgshd->bghqs", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1).astype(v.dtype)
        out = jnp.einsum("bghqs,bgshd->bgqhd", weights, v)
        return self.out_proj(out.reshape(*out.shape[:3], -1))


class TwoWayAttentionBlock(nnx.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    def __init__(self, config: DecoderConfig, is_first: bool, **options: Any):
        self.is_first = is_first
        dim, heads, rate = config.d_model, config.decoder_heads, config.attention_downsample_rate
        self.self_attn = NarrowAttention(dim, heads, **options)
        self.cross_attn_token_to_image = NarrowAttention(dim, heads, rate, **options)
        self.cross_attn_image_to_token = NarrowAttention(dim, heads, rate, **options)
        self.mlp = Mlp((dim, config.decoder_mlp_dim, dim), **options)
        self.norm1 = layer_norm(dim, TRANSFORMER_EPSILON, **options)
        self.norm2 = layer_norm(dim, TRANSFORMER_EPSILON, **options)
        self.norm3 = layer_norm(dim, TRANSFORMER_EPSILON, **options)
        self.norm4 = layer_norm(dim, TRANSFORMER_EPSILON, **options)

    def __call__(
        self,
        tokens: Float[Array, "B G N C"],
        image: Float[Array, "B #G S C"],
        token_pe: Float[Array, "B G N C"],
        image_pe: Float[Array, "S C"],
    ) -> tuple[Float[Array, "B G N C"], Float[Array, "B G S C"]]:
        if self.is_first:  # the tokens are still their own position encoding: no residual
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        placed = image + image_pe
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pe, placed, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(placed, tokens + token_pe, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nnx.Module):
    """Blocks of two-way attention; at the end the tokens attend to the image once more."""

    def __init__(self, config: DecoderConfig, **options: Any):
        dim, heads, rate = config.d_model, config.decoder_heads, config.attention_downsample_rate
        self.layers = nnx.List(
            TwoWayAttentionBlock(config, is_first=i == 0, **options)
            for i in range(config.decoder_depth)
        )
        self.final_attn_token_to_image = NarrowAttention(dim, heads, rate, **options)
        self.norm_final_attn = layer_norm(dim, TRANSFORMER_EPSILON, **options)

    def __call__(
        self,
        tokens: Float[Array, "B G N C"],
        image: Float[Array, "B #G S C"],
        image_pe: Float[Array, "S C"],
    ) -> tuple[Float[Array, "B G N C"], Float[Array, "B G S C"]]:
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class OutputUpscaling(nnx.Module):
    """Image features to four times their side; SAM 2 adds the trunk's finer ones on the way."""

    def __init__(self, dim: int, **options: Any):
        self.conv1 = Upscale2x(dim, dim // 4, **options)
        self.norm = layer_norm(dim // 4, **options)
        self.conv2 = Upscale2x(dim // 4, dim // 8, **options)

    def __call__(
        self, image: Float[Array, "B G h w C"], high_res: HighRes | None
    ) -> Float[Array, "B G 4*h 4*w C//8"]:
        fine, medium = (0, 0) if high_res is None else (x[:, None] for x in high_res)
        x = gelu(self.norm(self.conv1(image) + medium))
        return gelu(self.conv2(x) + fine)


class MaskDecoder(nnx.Module):
    """Masks and their predicted quality for each prompt.

    SAM 2 adds to SAM 1 an object score, finer image features, a sigmoid on the predicted quality,
    and the rule that replaces an unstable mask.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.dtype, options = dtype, dict(rngs=rngs, dtype=dtype)
        self.is_sam2 = isinstance(config, Sam2Config)
        dim, masks = config.d_model, 1 + config.num_multimask_outputs
        init = nnx.initializers.normal(1.0)
        self.transformer = TwoWayTransformer(config, **options)
        if self.is_sam2:
            self.delta, self.thresh = config.stability_delta, config.stability_thresh
            self.obj_score_token = nnx.Embed(1, dim, embedding_init=init, rngs=rngs)
        self.iou_token = nnx.Embed(1, dim, embedding_init=init, rngs=rngs)
        self.mask_tokens = nnx.Embed(masks, dim, embedding_init=init, rngs=rngs)
        self.output_upscaling = OutputUpscaling(dim, **options)
        if self.is_sam2:
            self.conv_s0 = linear(dim, dim // 8, **options)
            self.conv_s1 = linear(dim, dim // 4, **options)
        self.output_hypernetworks_mlps = nnx.List(
            Mlp((dim, dim, dim, dim // 8), **options) for _ in range(masks)
        )
        hidden = (config.iou_head_hidden_dim,) * (config.iou_head_depth - 1)
        self.iou_prediction_head = Mlp((dim, *hidden, masks), **options)
        if self.is_sam2:
            self.pred_obj_score_head = Mlp((dim, dim, dim, 1), **options)

    def attend(
        self,
        image_embed: Float[Array, "B h w C"],
        image_pe: Float[Array, "h w C"],
        sparse: Float[Array, "B G N C"],
        dense: Float[Array, "B #G #h #w C"],
    ) -> tuple[Float[Array, "B G L C"], Float[Array, "B G h w C"]]:
        """Output tokens (SAM 2's object score, IoU, masks, the prompt's) and image features."""
        batch, height, width, channels = image_embed.shape
        embeds = (self.obj_score_token,) if self.is_sam2 else ()
        embeds += (self.iou_token, self.mask_tokens)
        outputs = jnp.concatenate([embed.embedding[...] for embed in embeds]).astype(self.dtype)
        outputs = jnp.broadcast_to(outputs, (*sparse.shape[:2], *outputs.shape))
        tokens = jnp.concatenate([outputs, sparse.astype(self.dtype)], axis=2)
        image = (image_embed[:, None] + dense).astype(self.dtype)
        image = image.reshape(batch, -1, height * width, channels)
        tokens, image = self.transformer(tokens, image, image_pe.reshape(-1, channels))
        return tokens, image.reshape(batch, -1, height, width, channels)

    def __call__(
        self,
        image_embed: Float[Array, "B h w C"],
        image_pe: Float[Array, "h w C"],
        high_res: HighRes | None,
        sparse: Float[Array, "B G N C"],
        dense: Float[Array, "B #G #h #w C"],
        *,
        stability: bool,
    ) -> SamMasks:
        """Decodes G prompts for each of B images.

        Args:
          image_embed: the coarse features, shared by an image's prompts.
          image_pe: the position encoding of their cells.
          high_res: SAM 2's finer features, finest first, after `conv_s0` and `conv_s1`.
          sparse: prompt tokens.
          dense: is added to the features.
          stability: whether an unstable mask of token 0 gives way to the best of the others, as
            SAM 2 does whenever it is not training. SAM 1 never does.
        """
        tokens, image = self.attend(image_embed, image_pe, sparse, dense)
        first = int(self.is_sam2)  # behind the object score's token: IoU, then the masks
        upscaled = self.output_upscaling(image, high_res)
        mlps = enumerate(self.output_hypernetworks_mlps, start=first + 1)
        hyper = jnp.stack([mlp(tokens[:, :, i]) for i, mlp in mlps], axis=2)
        all_logits = jnp.einsum(
            "bgkc,bghwc->bgkhw", hyper, upscaled, preferred_element_type=jnp.float32
        )
        iou = self.iou_prediction_head(tokens[:, :, first]).astype(jnp.float32)
        if not self.is_sam2:
            selected = jnp.zeros(iou.shape[:2], jnp.int32)
            return SamMasks(all_logits[:, :, 0], selected, all_logits, iou)
        iou = jax.nn.sigmoid(iou)
        score = stability_score(all_logits[:, :, 0], self.delta)
        if stability:
            best = 1 + jnp.argmax(iou[..., 1:], axis=-1)
            selected = jnp.where(score >= self.thresh, 0, best).astype(jnp.int32)
            index = selected[:, :, None, None, None]
            logits = jnp.take_along_axis(all_logits, index, axis=2)[:, :, 0]
        else:
            selected = jnp.zeros(score.shape, jnp.int32)
            logits = all_logits[:, :, 0]
        object_score = self.pred_obj_score_head(tokens[:, :, 0])[..., 0].astype(jnp.float32)
        return SamMasks(logits, selected, all_logits, iou, object_score, score)


def stability_score(logits: Float[Array, "*batch h w"], delta: float) -> Float[Array, "*batch"]:
    """Pixels above `delta` over those above `-delta`; 1 for an empty mask."""
    inner = jnp.sum(logits > delta, axis=(-2, -1)).astype(jnp.float32)
    outer = jnp.sum(logits > -delta, axis=(-2, -1)).astype(jnp.float32)
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)
