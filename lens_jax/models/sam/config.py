"""Shapes of SAM 1 and of SAM 2's image model, and the published ones."""

from __future__ import annotations

import dataclasses

Shape = tuple[int, ...]

PATCH = 16  # pixels a side of a cell of the image embedding


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Hyper-parameters of prompt encoder and mask decoder, the same in SAM 1 and SAM 2.

    An image is a square of `image_size` pixels; its image embedding has a cell for every patch of
    16 x 16 pixels and the width `d_model`.
    """

    image_size: int = 1024
    d_model: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256

    def __post_init__(self):
        if self.d_model % 8 or self.d_model // self.attention_downsample_rate % self.decoder_heads:
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 8 and, divided by "
                f"attention_downsample_rate {self.attention_downsample_rate}, of the "
                f"{self.decoder_heads} decoder heads"
            )

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding in cells; masks have four times this side."""
        return self.image_size // PATCH

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution mask logits in pixels."""
        return 4 * self.embedding_size


@dataclasses.dataclass(frozen=True)
class SamConfig(DecoderConfig):
    """Hyper-parameters of SAM 1; names follow the original code, defaults are those of ViT-B.

    The blocks in `global_attn_indexes` see the whole image, the others windows of `window_size`
    cells a side.
    """

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: Shape = (2, 5, 8, 11)
    window_size: int = 14
    mlp_dim: int = 3072

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % PATCH:
            raise ValueError(f"image_size {self.image_size} must be a multiple of {PATCH}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} must be a multiple of the {self.num_heads} heads"
            )
        if outside := [i for i in self.global_attn_indexes if not 0 <= i < self.depth]:
            raise ValueError(f"global_attn_indexes: {outside} are none of {self.depth} blocks")


@dataclasses.dataclass(frozen=True)
class Sam2Config(DecoderConfig):
    """Hyper-parameters of SAM 2; names follow the original configuration files.

    A stage of the trunk halves the resolution and doubles width and heads. `window_spec` is the
    attention window of each stage in tokens; the blocks in `global_att_blocks` see everything. The
    neck projects each stage to `d_model`; the decoder works at that width. Without the `scalp`
    coarsest levels, three remain: the image embedding (stride 16) and two of higher resolution.
    """

    embed_dim: int = 144
    num_heads: int = 2
    stages: Shape = (2, 6, 36, 4)
    global_att_blocks: Shape = (23, 33, 43)
    window_pos_embed_bkg_spatial_size: Shape = (7, 7)
    window_spec: Shape = (8, 4, 16, 8)
    fpn_top_down_levels: Shape = (2, 3)
    scalp: int = 1
    directly_add_no_mem_embed: bool = True
    stability_delta: float = 0.05
    stability_thresh: float = 0.98

    def __post_init__(self):
        super().__post_init__()
        stride = 4 * 2 ** (len(self.stages) - 1)
        if len(self.window_spec) != len(self.stages):
            raise ValueError(
                f"window_spec {self.window_spec} needs one window for each of the "
                f"{len(self.stages)} stages"
            )
        if len(self.stages) - self.scalp != 3:
            raise ValueError(
                f"{len(self.stages)} stages without the scalp of {self.scalp} leave "
                f"{len(self.stages) - self.scalp} feature levels; the mask decoder takes 3"
            )
        if self.image_size % stride or (self.image_size // 4) % self.window_spec[0]:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of {stride} and of "
                f"{4 * self.window_spec[0]} (a window of {self.window_spec[0]} tokens)"
            )

    @property
    def stage_dims(self) -> Shape:
        """Width of each trunk stage, finest first."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.stages)))


_SMALL = Sam2Config(
    embed_dim=96,
    num_heads=1,
    stages=(1, 2, 11, 2),
    global_att_blocks=(7, 10, 13),
    window_spec=(8, 4, 14, 7),
)
# SAM 2 and SAM 2.1 share these; their image models differ in weights only.
PRESETS = {
    "tiny": dataclasses.replace(_SMALL, stages=(1, 2, 7, 2), global_att_blocks=(5, 7, 9)),
    "small": _SMALL,
    "base_plus": dataclasses.replace(
        _SMALL,
        embed_dim=112,
        num_heads=2,
        stages=(2, 3, 16, 3),
        global_att_blocks=(12, 16, 20),
        window_pos_embed_bkg_spatial_size=(14, 14),
    ),
    "large": Sam2Config(),
}

SAM_PRESETS = {
    "vit_b": SamConfig(),
    "vit_l": SamConfig(
        embed_dim=1024,
        depth=24,
        num_heads=16,
        global_attn_indexes=(5, 11, 17, 23),
        mlp_dim=4096,
    ),
    "vit_h": SamConfig(
        embed_dim=1280,
        depth=32,
        num_heads=16,
        global_attn_indexes=(7, 15, 23, 31),
        mlp_dim=5120,
    ),
}
