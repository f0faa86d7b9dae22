"""The weight table of SAM 1: original names, as in Meta's .pth files."""

import re
from collections.abc import Iterator, Mapping

from lens_jax.convert_weights import sam2
from lens_jax.convert_weights.sam_parts import (
    mask_decoder,
    mlp,
    norm,
    norms_and_attention,
    path,
    prompt_encoder,
    with_bias,
)
from lens_jax.convert_weights.table import (
    CONV2D,
    SQUEEZE,
    Entry,
    Shape,
    Table,
    WeightsError,
    flattened_conv,
)
from lens_jax.model_configs.sam import read_sam1, write_hf_sam1
from lens_jax.models.sam.config import SAM_PRESETS, SamConfig

CONFIG_FILE = "sam_config.json"  # our own, beside the weights
read_config, read_hf, write_hf = read_sam1, read_sam1, write_hf_sam1
CARRIED_NAMES = ()  # the model uses every tensor


def _image_encoder(config: SamConfig) -> Iterator[Entry]:
    name = "image_encoder"
    yield Entry(f"{name}.pos_embed", f"{name}/pos_embed", SQUEEZE)
    yield from with_bias(f"{name}.patch_embed.proj", transform=CONV2D)
    for i in range(config.depth):
        block = f"{name}.blocks.{i}"
        yield from norms_and_attention(block)
        for axis in ("rel_pos_h", "rel_pos_w"):
            yield Entry(f"{block}.attn.{axis}", path(f"{block}.attn.{axis}"))
        yield from mlp(f"{block}.mlp", 2)
    neck = f"{name}/neck"
    yield Entry(
        f"{name}.neck.0.weight", f"{neck}/conv1/kernel", flattened_conv(config.embed_dim, 1, 1)
    )
    yield from norm(f"{name}.neck.1", f"{neck}/norm1")
    yield Entry(f"{name}.neck.2.weight", f"{neck}/conv2/kernel", CONV2D)
    yield from norm(f"{name}.neck.3", f"{neck}/norm2")


def _spelling(name: str) -> str:
    """SAM 1's name for what SAM 2 calls `name`."""
    name = re.sub(
        r"((?:blocks|layers)\.\d+\.mlp)\.layers\.(\d)",
        lambda match: f"{match[1]}.lin{int(match[2]) + 1}",
        name,
    )
    return name.removeprefix("sam_")


def table(config: SamConfig) -> Table:
    """Original name -> `sam/...` on our disk, for every parameter of `Sam(config)`."""
    entries = (*_image_encoder(config), *prompt_encoder(), *mask_decoder(config))
    return Table(tuple(Entry(_spelling(e.source), f"sam/{e.target}", e.transform) for e in entries))


# Original fragment -> the one in Hugging Face's SamModel, applied in this order.
_HF_FRAGMENTS = (
    ("image_encoder.", "vision_encoder."),
    ("patch_embed.proj.", "patch_embed.projection."),
    (".blocks.", ".layers."),
    (".norm", ".layer_norm"),
    ("neck.0.", "neck.conv1."),
    ("neck.1.", "neck.layer_norm1."),
    ("neck.2.", "neck.conv2."),
    ("neck.3.", "neck.layer_norm2."),
)
# Hugging Face has the random matrix of positions twice, under these names; its files need one.
HF_MATRIX = "shared_image_embedding.positional_embedding"
HF_MATRIX_AGAIN = "prompt_encoder.shared_embedding.positional_embedding"
HF_JUNK = ()

# What only SAM 1's image encoder has, in either spelling.
OWN_NAMES = r"(image|vision)_encoder\.pos_embed$|image_encoder\.blocks\.|vision_encoder\.layers\."


def hf_source(config: SamConfig, source: str) -> tuple[str, int | None]:
    """Where Hugging Face's SamModel keeps an original tensor: its name; no tensors are stacked."""
    if source.startswith("image_encoder."):
        for original, renamed in _HF_FRAGMENTS:
            source = source.replace(original, renamed)
        return source, None
    if source.endswith("positional_encoding_gaussian_matrix"):
        return HF_MATRIX, None
    if ".point_embeddings." in source:
        return source.replace(".point_embeddings.", ".point_embed."), None
    # Prompt encoder and mask decoder are renamed as SAM 2's, but for the attention's last layer.
    name, _ = sam2.hf_source(config, f"sam_{source}")
    return name.replace(".o_proj.", ".out_proj."), None


def original_encoder_name(name: str) -> str:
    """A name of Hugging Face's image encoder as the original, as far as it tells the size."""
    prefix = "vision_encoder."
    if not name.startswith(prefix):
        return name
    rest = name.removeprefix(prefix).replace("layers.", "blocks.")
    return "image_encoder." + rest.replace(".layer_norm", ".norm")


def recognise(shapes: Mapping[str, Shape], where: str = "the checkpoint") -> SamConfig:
    """The published model whose tensors have these shapes, original names, no prefix.

    Raises:
      WeightsError: when no published model has these shapes.
    """
    try:
        _, cells, _, embed_dim = shapes["image_encoder.pos_embed"]
    except (KeyError, ValueError):
        raise WeightsError(
            f"{where} holds no SAM 1: image_encoder.pos_embed [1, h, w, C] is missing"
        ) from None
    block = re.compile(r"image_encoder\.blocks\.\d+\.norm1\.weight")
    depth = sum(block.fullmatch(name) is not None for name in shapes)
    for preset in SAM_PRESETS.values():
        if (preset.embedding_size, preset.embed_dim, preset.depth) == (cells, embed_dim, depth):
            return preset
    raise WeightsError(
        f"{where} has an image encoder of {depth} blocks of width {embed_dim} on {cells} x "
        f"{cells} cells, which is no published SAM 1; put its sam_config.json beside it"
    )
