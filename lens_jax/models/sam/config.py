"""Shapes of a SAM 2 image model, and the published ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]

# What every published SAM 2 does and this port takes for granted.
FIXED = {
    "use_high_res_features_in_sam": True,
    "pred_obj_scores": True,
    "pred_obj_scores_mlp": True,
    "iou_prediction_use_sigmoid": True,
    "dynamic_multimask_via_stability": True,
}


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Hyper-parameters of the image model; names follow the original configuration files.

    A stage of the trunk halves the resolution and doubles width and heads. `window_spec` is the
    attention window of each stage in tokens; the blocks in `global_att_blocks` see everything. The
    neck projects each stage to `d_model`; the decoder works at that width. Without the `scalp`
    coarsest levels, three remain: the image embedding (stride 16) and two of higher resolution.
    """

    image_size: int = 1024
    embed_dim: int = 144
    num_heads: int = 2
    stages: Shape = (2, 6, 36, 4)
    global_att_blocks: Shape = (23, 33, 43)
    window_pos_embed_bkg_spatial_size: Shape = (7, 7)
    window_spec: Shape = (8, 4, 16, 8)
    d_model: int = 256
    fpn_top_down_levels: Shape = (2, 3)
    scalp: int = 1
    directly_add_no_mem_embed: bool = True
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    stability_delta: float = 0.05
    stability_thresh: float = 0.98

    def __post_init__(self):
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
        if self.d_model % 8 or self.d_model // self.attention_downsample_rate % self.decoder_heads:
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 8 and, divided by "
                f"attention_downsample_rate {self.attention_downsample_rate}, of the "
                f"{self.decoder_heads} decoder heads"
            )

    @property
    def stage_dims(self) -> Shape:
        """Width of each trunk stage, finest first."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.stages)))

    @property
    def embedding_size(self) -> int:
        """Side of the image embedding in cells; masks have four times this side."""
        return self.image_size // (4 * 2 ** (len(self.stages) - 1 - self.scalp))

    @property
    def mask_size(self) -> int:
        """Side of the low-resolution mask logits in pixels."""
        return 4 * self.embedding_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "sam2_config.json") -> Sam2Config:
        """Reads the nested form with the keys `trunk`, `neck` and `decoder`.

        Raises:
          ValueError: on a switch that this port does not have, or contradicting shapes.
          KeyError: on a missing key.
        """
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise ValueError(f"{where}: {key} = {config[key]} is not supported, only {value}")
        trunk, neck, decoder = config["trunk"], config["neck"], config["decoder"]
        if neck.get("fpn_interp_model", "nearest") != "nearest":
            raise ValueError(
                f"{where}: neck.fpn_interp_model = {neck['fpn_interp_model']} is not supported, "
                "only nearest"
            )
        if decoder["transformer_dim"] != neck["d_model"]:
            raise ValueError(
                f"{where}: decoder.transformer_dim {decoder['transformer_dim']} and neck.d_model "
                f"{neck['d_model']} must be equal"
            )
        result = cls(
            image_size=config["image_size"],
            embed_dim=trunk["embed_dim"],
            num_heads=trunk["num_heads"],
            stages=tuple(trunk["stages"]),
            global_att_blocks=tuple(trunk["global_att_blocks"]),
            window_pos_embed_bkg_spatial_size=tuple(trunk["window_pos_embed_bkg_spatial_size"]),
            window_spec=tuple(trunk["window_spec"]),
            d_model=neck["d_model"],
            fpn_top_down_levels=tuple(neck["fpn_top_down_levels"]),
            scalp=config["scalp"],
            directly_add_no_mem_embed=config["directly_add_no_mem_embed"],
            decoder_depth=decoder["depth"],
            decoder_heads=decoder["heads"],
            decoder_mlp_dim=decoder["mlp_dim"],
            attention_downsample_rate=decoder["attention_downsample_rate"],
            num_multimask_outputs=decoder["num_multimask_outputs"],
            iou_head_depth=decoder["iou_head_depth"],
            iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
            stability_delta=config.get("dynamic_multimask_stability_delta", 0.05),
            stability_thresh=config.get("dynamic_multimask_stability_thresh", 0.98),
        )
        channels = tuple(neck.get("backbone_channel_list", result.stage_dims[::-1]))
        if channels != result.stage_dims[::-1]:
            raise ValueError(
                f"{where}: neck.backbone_channel_list {list(channels)} does not fit the trunk's "
                f"{list(result.stage_dims[::-1])}"
            )
        return result

    def to_dict(self) -> dict[str, Any]:
        """The nested form that `from_dict` reads."""
        cells = [self.embedding_size * 2**level for level in (2, 1, 0)]
        return {
            "image_size": self.image_size,
            "trunk": {
                "embed_dim": self.embed_dim,
                "num_heads": self.num_heads,
                "stages": list(self.stages),
                "global_att_blocks": list(self.global_att_blocks),
                "window_pos_embed_bkg_spatial_size": list(self.window_pos_embed_bkg_spatial_size),
                "window_spec": list(self.window_spec),
            },
            "neck": {
                "d_model": self.d_model,
                "backbone_channel_list": list(self.stage_dims[::-1]),
                "fpn_top_down_levels": list(self.fpn_top_down_levels),
                "fpn_interp_model": "nearest",
            },
            "scalp": self.scalp,
            "feature_sizes": [[side, side] for side in cells],
            "low_res_mask_size": [self.mask_size, self.mask_size],
            "decoder": {
                "transformer_dim": self.d_model,
                "depth": self.decoder_depth,
                "heads": self.decoder_heads,
                "mlp_dim": self.decoder_mlp_dim,
                "attention_downsample_rate": self.attention_downsample_rate,
                "num_multimask_outputs": self.num_multimask_outputs,
                "iou_head_depth": self.iou_head_depth,
                "iou_head_hidden_dim": self.iou_head_hidden_dim,
            },
            "directly_add_no_mem_embed": self.directly_add_no_mem_embed,
            **FIXED,
            "dynamic_multimask_stability_delta": self.stability_delta,
            "dynamic_multimask_stability_thresh": self.stability_thresh,
        }

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape], where: str = "the checkpoint") -> Sam2Config:
        """Recognises a published model by the shapes of its tensors, original names, no prefix.

        Heads, windows and global blocks leave no trace in shapes, so only published models can be
        told; SAM 2 and 2.1 differ only in tensors that the image model does not use.

        Raises:
          ValueError: when no published model has these shapes.
        """
        try:
            embed_dim = shapes["image_encoder.trunk.patch_embed.proj.weight"][0]
        except KeyError as error:
            raise ValueError(f"{where} holds no SAM 2 trunk: {error} is missing") from None
        block = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.norm2\.weight")
        widths = [shape[0] for name, shape in shapes.items() if block.fullmatch(name)]
        stages = tuple(widths.count(width) for width in sorted(set(widths)))
        for preset in PRESETS.values():
            if (preset.embed_dim, preset.stages) == (embed_dim, stages):
                return preset
        raise ValueError(
            f"{where} has a trunk of embed_dim {embed_dim} and stages {list(stages)}, which is no "
            "published SAM 2; put its sam2_config.json beside it"
        )


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
