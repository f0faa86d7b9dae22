"""SAM 1 and SAM 2, the image models: an image encoder, a prompt encoder and a mask decoder.

Kirillov et al., "Segment Anything" (2023); Ravi et al., "SAM 2: Segment Anything in Images and
Videos" (2024), without its memory for video. They differ in the image encoder.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, UInt8

from lens_jax.models.long_attention import XLA, Attention
from lens_jax.models.sam.config import DecoderConfig, Sam2Config, SamConfig
from lens_jax.models.sam.hiera import HieraEncoder
from lens_jax.models.sam.mask_decoder import HighRes, MaskDecoder, SamMasks
from lens_jax.models.sam.prompt_encoder import SamPromptEncoder
from lens_jax.models.sam.vit import VisionTransformer

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)


@struct.dataclass
class SamFeatures:
    """Features that the mask decoder reads: an embedding and, from SAM 2, two finer maps."""

    image_embed: Float[Array, "B h w C"]
    high_res: HighRes | None = None


class Segmenter(nnx.Module):
    """Encodes an image once, decodes any number of prompts; maps are channels-last.

    Each family has its own `encode`.
    """

    def __init__(
        self, config: DecoderConfig, image_encoder: nnx.Module, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        self.config, self.dtype = config, dtype
        self.image_encoder = image_encoder
        self.sam_prompt_encoder = SamPromptEncoder(config, rngs=rngs, dtype=dtype)
        self.sam_mask_decoder = MaskDecoder(config, rngs=rngs, dtype=dtype)

    def normalize(self, pixels: UInt8[Array, "B A A 3"]) -> Float[Array, "B A A 3"]:
        """Pixels 0..255 to what `encode` takes, float32."""
        return (pixels.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD

    def decode(
        self,
        features: SamFeatures,
        sparse: Float[Array, "B G N C"],
        dense: Float[Array, "B G h w C"] | None = None,
        *,
        stability: bool,
    ) -> SamMasks:
        """Masks of G prompts for each image, single-mask output.

        Args:
          features: from `encode`, one row an image.
          sparse: prompt tokens, from the prompt encoder or from elsewhere.
          dense: the embedding of mask prompts; None: there are none.
          stability: see `MaskDecoder`; True in evaluation.
        """
        if dense is None:
            dense = self.sam_prompt_encoder.no_mask()[None, None, None, None]
        return self.sam_mask_decoder(
            features.image_embed,
            self.sam_prompt_encoder.dense_pe(),
            features.high_res,
            sparse,
            dense,
            stability=stability,
        )


class Sam1(Segmenter):
    """A plain ViT and a mask decoder that takes its one level; the mask is always token 0's.

    Images come to it as LENS brings them to SAM 2: resized to the whole square without keeping
    the aspect, with the same mean and standard deviation. (SAM 1's own predictor keeps the aspect
    and pads; LENS trains the prompt for its own way.)
    """

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        encoder = VisionTransformer(config, rngs=rngs, dtype=dtype)
        super().__init__(config, encoder, rngs=rngs, dtype=dtype)

    def encode(self, images: Float[Array, "B A A 3"]) -> SamFeatures:
        """Features of normalised images."""
        return SamFeatures(self.image_encoder(images.astype(self.dtype)))


class Sam2(Segmenter):
    """Trunk, feature pyramid, and a mask decoder that takes three levels."""

    def __init__(
        self,
        config: Sam2Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        attention: Attention = XLA,
    ):
        encoder = HieraEncoder(config, rngs=rngs, dtype=dtype, attention=attention)
        super().__init__(config, encoder, rngs=rngs, dtype=dtype)
        init = nnx.initializers.truncated_normal(0.02)
        self.no_mem_embed = nnx.Param(init(rngs.params(), (config.d_model,)))

    def encode(self, images: Float[Array, "B A A 3"]) -> SamFeatures:
        """Features of normalised images."""
        fine, medium, coarse = self.image_encoder(images.astype(self.dtype))
        decoder = self.sam_mask_decoder
        if self.config.directly_add_no_mem_embed:
            coarse = coarse + self.no_mem_embed[...].astype(self.dtype)
        return SamFeatures(coarse, (decoder.conv_s0(fine), decoder.conv_s1(medium)))
