"""SAM 2 for single pictures (Ravi et al., "SAM 2: Segment Anything in Images and Videos", 2024).

The memory for video is left out.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lens_jax.models.attention import XLA, Attention
from lens_jax.models.sam.config import Sam2Config
from lens_jax.models.sam.hiera import Hiera
from lens_jax.models.sam.neck import FpnNeck
from lens_jax.models.sam.segmenter import SamFeatures, Segmenter


class ImageEncoder(nnx.Module):
    """Trunk and neck."""

    def __init__(
        self, config: Sam2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype, attention: Attention
    ):
        self.trunk = Hiera(config, rngs=rngs, dtype=dtype, attention=attention)
        self.neck = FpnNeck(config, rngs=rngs, dtype=dtype)

    def __call__(self, images: Float[Array, "B A A 3"]) -> list[Float[Array, "B h w C"]]:
        return self.neck(self.trunk(images))


class Sam2(Segmenter):
    """The image model: trunk, feature pyramid, and a mask decoder that takes three levels."""

    def __init__(
        self,
        config: Sam2Config,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        attention: Attention = XLA,
    ):
        encoder = ImageEncoder(config, rngs=rngs, dtype=dtype, attention=attention)
        super().__init__(config, encoder, rngs=rngs, dtype=dtype)
        init = nnx.initializers.truncated_normal(0.02)
        self.no_mem_embed = nnx.Param(init(rngs.params(), (config.d_model,)))

    def encode(self, images: Float[Array, "B A A 3"]) -> SamFeatures:
        """Features of normalised pictures."""
        fine, medium, coarse = self.image_encoder(images.astype(self.dtype))
        decoder = self.sam_mask_decoder
        if self.config.directly_add_no_mem_embed:
            coarse = coarse + self.no_mem_embed[...].astype(self.dtype)
        return SamFeatures(coarse, (decoder.conv_s0(fine), decoder.conv_s1(medium)))
