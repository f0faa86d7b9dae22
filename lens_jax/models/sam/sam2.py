"""SAM 2 for single pictures (Ravi et al., "SAM 2: Segment Anything in Images and Videos", 2024).

The memory for video is left out. Maps are channels-last throughout.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, UInt8

from lens_jax.models.sam.config import Sam2Config
from lens_jax.models.sam.hiera import Hiera
from lens_jax.models.sam.mask_decoder import MaskDecoder, SamMasks
from lens_jax.models.sam.neck import FpnNeck
from lens_jax.models.sam.prompt_encoder import PromptEncoder

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)


@struct.dataclass
class SamFeatures:
    """A picture as the mask decoder sees it: the coarse embedding and two finer maps."""

    image_embed: Float[Array, "B h w C"]
    high_res: tuple[Float[Array, "B 4*h 4*w C//8"], Float[Array, "B 2*h 2*w C//4"]]


class ImageEncoder(nnx.Module):
    """Trunk and neck."""

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.trunk = Hiera(config, rngs=rngs, dtype=dtype)
        self.neck = FpnNeck(config, rngs=rngs, dtype=dtype)

    def __call__(self, images: Float[Array, "B A A 3"]) -> list[Float[Array, "B h w C"]]:
        return self.neck(self.trunk(images))


class Sam2(nnx.Module):
    """The image model: `encode` a picture once, `decode` any number of prompts."""

    def __init__(self, config: Sam2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config, self.dtype = config, dtype
        self.image_encoder = ImageEncoder(config, rngs=rngs, dtype=dtype)
        self.sam_prompt_encoder = PromptEncoder(config, rngs=rngs, dtype=dtype)
        self.sam_mask_decoder = MaskDecoder(config, rngs=rngs, dtype=dtype)
        init = nnx.initializers.truncated_normal(0.02)
        self.no_mem_embed = nnx.Param(init(rngs.params(), (config.d_model,)))

    def normalize(self, pixels: UInt8[Array, "B A A 3"]) -> Float[Array, "B A A 3"]:
        """Pixels 0..255 to what `encode` takes, float32."""
        return (pixels.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_STD

    def encode(self, images: Float[Array, "B A A 3"]) -> SamFeatures:
        """Features of normalised pictures."""
        fine, medium, coarse = self.image_encoder(images.astype(self.dtype))
        decoder = self.sam_mask_decoder
        if self.config.directly_add_no_mem_embed:
            coarse = coarse + self.no_mem_embed[...].astype(self.dtype)
        return SamFeatures(coarse, (decoder.conv_s0(fine), decoder.conv_s1(medium)))

    def decode(
        self,
        features: SamFeatures,
        sparse: Float[Array, "B G N C"],
        dense: Float[Array, "B G h w C"] | None = None,
        *,
        stability: bool,
    ) -> SamMasks:
        """Masks of G prompts for each picture, single-mask output.

        Args:
          features: from `encode`, one row a picture.
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
