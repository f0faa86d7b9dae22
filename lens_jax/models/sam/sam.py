"""SAM 1 (Kirillov et al., "Segment Anything", 2023)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models.sam.config import SamConfig
from lens_jax.models.sam.segmenter import SamFeatures, Segmenter
from lens_jax.models.sam.vit import VisionTransformer


class Sam(Segmenter):
    """A plain ViT and a mask decoder that takes its one level; the mask is always token 0's.

    Pictures come to it as LENS brings them to SAM 2: resized to the whole square without keeping
    the aspect, with the same mean and standard deviation. (SAM 1's own predictor keeps the aspect
    and pads; LENS trains the prompt for its own way.)
    """

    def __init__(self, config: SamConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        encoder = VisionTransformer(config, rngs=rngs, dtype=dtype)
        super().__init__(config, encoder, rngs=rngs, dtype=dtype)

    def encode(self, images: Float[Array, "B A A 3"]) -> SamFeatures:
        """Features of normalised pictures."""
        return SamFeatures(self.image_encoder(images.astype(self.dtype)))
