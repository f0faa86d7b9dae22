"""Parts of the tables of SAM 1 and SAM 2, which share prompt encoder and mask decoder.

Names are those of SAM 2; SAM 1 spells a few of them otherwise.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lens_jax.convert_weights.table import (
    CONV2D,
    CONV_TRANSPOSE2D,
    IDENTITY,
    LINEAR,
    Entry,
    Transform,
    WeightsError,
    flattened_conv,
)
from lens_jax.data.processor_files import image_processor
from lens_jax.models.sam.config import DecoderConfig, Sam2Config
from lens_jax.models.sam.segmenter import PIXEL_MEAN, PIXEL_STD


def check_pictures(directory: Path) -> None:
    """Raises WeightsError where Hugging Face's SAM normalises images unlike all published ones.

    LENS resizes them in its own way, whatever is said there.
    """
    file, settings = image_processor(directory)
    for key, published in {"image_mean": PIXEL_MEAN / 255, "image_std": PIXEL_STD / 255}.items():
        said = (settings or {}).get(key)
        if said is not None and (np.shape(said) != (3,) or not np.allclose(said, published)):
            expected = [round(float(x), 3) for x in published]
            raise WeightsError(f"{file}: {key} is {said}: only {expected} is supported")


def with_bias(
    source: str, target: str | None = None, transform: Transform = LINEAR
) -> Iterator[Entry]:
    """A layer with `kernel` and `bias`, at the path that its name says if no other is given."""
    target = target or path(source)
    yield Entry(f"{source}.weight", f"{target}/kernel", transform)
    yield Entry(f"{source}.bias", f"{target}/bias")


def norm(source: str, target: str | None = None) -> Iterator[Entry]:
    """A LayerNorm, likewise."""
    target = target or path(source)
    yield Entry(f"{source}.weight", f"{target}/scale")
    yield Entry(f"{source}.bias", f"{target}/bias")


def embed(source: str) -> Entry:
    """An embedding, with the path that its name says."""
    return Entry(f"{source}.weight", f"{path(source)}/embedding")


def path(source: str) -> str:
    """An original name as a path."""
    return source.replace(".", "/")


def mlp(source: str, layers: int) -> Iterator[Entry]:
    """Linear layers `source.layers.i`."""
    for i in range(layers):
        name = f"{source}.layers.{i}"
        yield from with_bias(name)


def norms_and_attention(block: str) -> Iterator[Entry]:
    """Both norms and the attention of a block of the image encoder."""
    for kind in ("norm1", "norm2"):
        yield from norm(f"{block}.{kind}")
    for linear in ("attn.qkv", "attn.proj"):
        yield from with_bias(f"{block}.{linear}")


def prompt_encoder() -> Iterator[Entry]:
    """Original name -> path in our tree."""
    name = "sam_prompt_encoder"
    matrix = f"{name}.pe_layer.positional_encoding_gaussian_matrix"
    yield Entry(matrix, path(matrix), IDENTITY)
    for i in range(4):
        yield embed(f"{name}.point_embeddings.{i}")
    yield embed(f"{name}.not_a_point_embed")
    yield embed(f"{name}.no_mask_embed")
    source, target = f"{name}.mask_downscaling", f"{name}/mask_downscaling"
    yield from with_bias(f"{source}.0", f"{target}/conv1", CONV2D)
    yield from norm(f"{source}.1", f"{target}/norm1")
    yield from with_bias(f"{source}.3", f"{target}/conv2", CONV2D)
    yield from norm(f"{source}.4", f"{target}/norm2")
    yield from with_bias(f"{source}.6", f"{target}/conv3", flattened_conv(16, 1, 1))


def _attention(source: str) -> Iterator[Entry]:
    for linear in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from with_bias(f"{source}.{linear}")


def mask_decoder(config: DecoderConfig) -> Iterator[Entry]:
    """Original name -> path in our tree."""
    name, is_sam2 = "sam_mask_decoder", isinstance(config, Sam2Config)
    for token in ("iou_token", "mask_tokens", *(["obj_score_token"] if is_sam2 else [])):
        yield embed(f"{name}.{token}")
    transformer = f"{name}.transformer"
    for i in range(config.decoder_depth):
        layer = f"{transformer}.layers.{i}"
        for attention in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            yield from _attention(f"{layer}.{attention}")
        for kind in ("norm1", "norm2", "norm3", "norm4"):
            yield from norm(f"{layer}.{kind}")
        yield from mlp(f"{layer}.mlp", 2)
    yield from _attention(f"{transformer}.final_attn_token_to_image")
    yield from norm(f"{transformer}.norm_final_attn")
    source, target = f"{name}.output_upscaling", f"{name}/output_upscaling"
    yield from with_bias(f"{source}.0", f"{target}/conv1", CONV_TRANSPOSE2D)
    yield from norm(f"{source}.1", f"{target}/norm")
    yield from with_bias(f"{source}.3", f"{target}/conv2", CONV_TRANSPOSE2D)
    for i in range(1 + config.num_multimask_outputs):
        yield from mlp(f"{name}.output_hypernetworks_mlps.{i}", 3)
    yield from mlp(f"{name}.iou_prediction_head", config.iou_head_depth)
    if is_sam2:
        yield from mlp(f"{name}.pred_obj_score_head", 3)
        for conv in ("conv_s0", "conv_s1"):
            transform = flattened_conv(config.d_model, 1, 1)
            yield from with_bias(f"{name}.{conv}", transform=transform)
