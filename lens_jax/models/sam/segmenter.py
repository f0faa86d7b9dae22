"""What SAM 1 and SAM 2 have in common: everything but the image encoder."""

import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, UInt8

from lens_jax.models.sam.config import DecoderConfig
from lens_jax.models.sam.mask_decoder import HighRes, MaskDecoder, SamMasks
from lens_jax.models.sam.prompt_encoder import PromptEncoder

PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)


@struct.dataclass
class SamFeatures:
    """A picture as the mask decoder sees it: the embedding and, of SAM 2, two finer maps."""

    image_embed: Float[Array, "B h w C"]
    high_res: HighRes | None = None


class Segmenter(nnx.Module):
    """`encode` a picture once, `decode` any number of prompts; maps are channels-last.

    What `encode` does is up to the family.
    """

    def __init__(
        self, config: DecoderConfig, image_encoder: nnx.Module, *, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        self.config, self.dtype = config, dtype
        self.image_encoder = image_encoder
        self.sam_prompt_encoder = PromptEncoder(config, rngs=rngs, dtype=dtype)
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
