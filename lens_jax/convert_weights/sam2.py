"""The weight table of SAM 2: original names, as in Meta's files and in LENS checkpoints."""

import re
from collections.abc import Iterator, Mapping

from lens_jax.convert_weights.sam_parts import (
    mask_decoder,
    mlp,
    norms_and_attention,
    path,
    prompt_encoder,
    with_bias,
)
from lens_jax.convert_weights.table import (
    CHANNELS_LAST,
    CONV2D,
    SQUEEZE,
    Entry,
    Shape,
    Table,
    WeightsError,
    chain,
    flattened_conv,
)
from lens_jax.model_configs.sam import read_hf_sam2, read_sam2, write_hf_sam2
from lens_jax.models.sam.config import PRESETS, Sam2Config

# Regular tensors of the original model that a single image never needs.
CARRIED_NAMES = (
    "mask_downsample.weight",
    "mask_downsample.bias",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    *(f"obj_ptr_proj.layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")),
    "obj_ptr_tpos_proj.weight",
    "obj_ptr_tpos_proj.bias",
)
CARRIED = tuple(map(re.escape, CARRIED_NAMES))
CONFIG_FILE = "sam2_config.json"  # our own, beside the weights
read_config, read_hf, write_hf = read_sam2, read_hf_sam2, write_hf_sam2
# The memory of video, which LENS takes out of the model but not out of its checkpoints.
JUNK = (r"memory_attention\..+", r"memory_encoder\..+", r"maskmem_tpos_enc")

_MAP = chain(CHANNELS_LAST, SQUEEZE)  # (1, C, h, w) -> (h, w, C)


def _image_encoder(config: Sam2Config) -> Iterator[Entry]:
    trunk = "image_encoder.trunk"
    yield from with_bias(f"{trunk}.patch_embed.proj", transform=CONV2D)
    yield Entry(f"{trunk}.pos_embed", path(f"{trunk}.pos_embed"), _MAP)
    yield Entry(f"{trunk}.pos_embed_window", path(f"{trunk}.pos_embed_window"), _MAP)
    first_blocks = [sum(config.stages[:stage]) for stage in range(1, len(config.stages))]
    for i in range(sum(config.stages)):
        block = f"{trunk}.blocks.{i}"
        yield from norms_and_attention(block)
        if i in first_blocks:
            yield from with_bias(f"{block}.proj")
        yield from mlp(f"{block}.mlp", 2)
    for i, dim in enumerate(config.stage_dims[::-1]):
        name = f"image_encoder.neck.convs.{i}"
        yield from with_bias(f"{name}.conv", path(name), flattened_conv(dim, 1, 1))


def table(config: Sam2Config) -> Table:
    """Original name -> `sam/...` on our disk, for every parameter of `Sam2(config)`."""
    entries = (
        *_image_encoder(config),
        *prompt_encoder(),
        *mask_decoder(config),
        Entry("no_mem_embed", "no_mem_embed", chain(SQUEEZE, SQUEEZE)),
    )
    return Table(
        tuple(Entry(e.source, f"sam/{e.target}", e.transform) for e in entries), CARRIED, JUNK
    )


# Original fragment -> the one in Hugging Face's Sam2Model, applied in this order.
_HF_FRAGMENTS = (
    ("image_encoder.trunk.", "vision_encoder.backbone."),
    ("image_encoder.neck.", "vision_encoder.neck."),
    (".conv.", "."),
    ("patch_embed.proj.", "patch_embed.projection."),
    ("sam_prompt_encoder.pe_layer.", "prompt_encoder.shared_embedding."),
    ("positional_encoding_gaussian_matrix", "positional_embedding"),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("sam_mask_decoder.", "mask_decoder."),
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    ("out_proj.", "o_proj."),
    (".norm_final_attn.", ".layer_norm_final_attn."),
    (".norm", ".layer_norm"),
    ("no_mem_embed", "no_memory_embedding"),
    ("no_mem_pos_enc", "no_memory_positional_encoding"),
    ("no_obj_ptr", "no_object_pointer"),
    ("no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
    ("obj_ptr_proj.", "object_pointer_proj."),
    ("obj_ptr_tpos_proj.", "temporal_positional_encoding_projection_layer."),
)
# Hugging Face keeps the random matrix of positions twice, under these names.
HF_MATRIX = "prompt_encoder.shared_embedding.positional_embedding"
HF_MATRIX_AGAIN = "shared_image_embedding.positional_embedding"
HF_JUNK = (r"memory_.+",)


def hf_source(config: Sam2Config, source: str) -> tuple[str, int | None]:
    """Where Hugging Face's SAM 2 keeps an original tensor: its name, and its row if stacked.

    Carried tensors are those of Sam2VideoModel, which Sam2Model passes over. The four point
    embeddings are rows of one tensor there; everything else is only renamed.
    """
    points = "sam_prompt_encoder.point_embeddings."
    if source.startswith(points):
        return "prompt_encoder.point_embed.weight", int(source.removeprefix(points).split(".")[0])
    name = source
    for original, renamed in _HF_FRAGMENTS:
        name = name.replace(original, renamed)
    mlp = re.fullmatch(r"(.+\.mlp|.+_head|.+_mlps\.\d+|\w+_proj)\.layers\.(\d+)\.(\w+)", name)
    if mlp is None:
        return name, None
    # The first and the last layer have names of their own there, those between are `layers`.
    head, index, rest = mlp[1], int(mlp[2]), mlp[3]
    depth = 2 if head.endswith(".mlp") else 3
    if head.endswith("iou_prediction_head"):
        depth = config.iou_head_depth
    if index == 0:
        return f"{head}.proj_in.{rest}", None
    if index == depth - 1:
        return f"{head}.proj_out.{rest}", None
    return f"{head}.layers.{index - 1}.{rest}", None


def original_encoder_name(name: str) -> str:
    """A name of Hugging Face's trunk as the original, as far as it tells the size."""
    prefix = "vision_encoder.backbone."
    if not name.startswith(prefix):
        return name
    rest = name.removeprefix(prefix).replace("embed.projection.", "embed.proj.")
    return "image_encoder.trunk." + rest.replace(".layer_norm", ".norm")


def recognise(shapes: Mapping[str, Shape], where: str = "the checkpoint") -> Sam2Config:
    """The published model whose tensors have these shapes, original names, no prefix.

    Heads, windows and global blocks leave no trace in shapes, so only published models can be
    told; SAM 2 and 2.1 differ only in tensors that the image model does not use.

    Raises:
      WeightsError: when no published model has these shapes.
    """
    try:
        embed_dim = shapes["image_encoder.trunk.patch_embed.proj.weight"][0]
    except KeyError as error:
        raise WeightsError(f"{where} holds no SAM 2 trunk: {error} is missing") from None
    block = re.compile(r"image_encoder\.trunk\.blocks\.\d+\.norm2\.weight")
    widths = [shape[0] for name, shape in shapes.items() if block.fullmatch(name)]
    stages = tuple(widths.count(width) for width in sorted(set(widths)))
    for preset in PRESETS.values():
        if (preset.embed_dim, preset.stages) == (embed_dim, stages):
            return preset
    raise WeightsError(
        f"{where} has a trunk of embed_dim {embed_dim} and stages {list(stages)}, which is no "
        "published SAM 2; put its sam2_config.json beside it"
    )
