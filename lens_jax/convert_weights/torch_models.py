"""LENS in PyTorch: Qwen-VL and SAM of transformers, and the context module between them.

transformers has no context module: it is written out here, from its tensors' official names.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from lens_jax.convert_weights import sam1
from lens_jax.convert_weights.table import WeightsError
from lens_jax.convert_weights.tables import hf_sam_entries, sam_family
from lens_jax.models.sam.config import Sam2Config, SamConfig


def load_model(
    model_class: Any, hf: Mapping[str, Any], state: Mapping[str, Tensor], **options: Any
) -> torch.nn.Module:
    """A model of transformers from tensors, each of which must have its place; in float32.

    Args:
      hf: its config.json.
      options: of `from_pretrained`.
    """
    model, info = model_class.from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(**hf),
        state_dict=dict(state),
        output_loading_info=True,
        **{"dtype": torch.float32, **options},
    )
    wrong = [
        name for key in ("missing", "unexpected", "mismatched") for name in info[f"{key}_keys"]
    ]
    if wrong:
        raise WeightsError(*(f"transformers has no place, or nothing, for {x}" for x in wrong))
    return model


def load_sam(
    config: SamConfig | Sam2Config, tensor: Callable[[str], Tensor], **options: Any
) -> torch.nn.Module:
    """transformers' SAM.

    Args:
      tensor: gives the tensor of a name in an official LENS checkpoint.
      options: of `from_pretrained`.
    """
    family = sam_family(config)
    state = {
        name: torch.cat([tensor(f"sam.{entry.source}") for entry in entries])
        for name, entries in hf_sam_entries(config).items()
    }
    model_class = transformers.SamModel if family is sam1 else transformers.Sam2Model
    return load_model(model_class, family.write_hf(config), state, **options)


def connect(weight: Callable[[str], Tensor], x: Tensor, depth: int, heads: int) -> Tensor:
    """The context module: SAM's prompt token [N, E] from the queries' hidden states [N, Q, D].

    Args:
      weight: gives the tensor of an official name.
      depth: blocks of the connector, of so many `heads`.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weight(f"{name}.weight"), weight(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        scale, bias = weight(f"{name}.weight"), weight(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)

    x = x + weight("connector.pos_embed")
    for i in range(depth):
        block = f"connector.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        qkv = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{block}.attn.proj")
        h = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(h * (1.702 * h).sigmoid(), f"{block}.mlp.fc2")
    x = F.conv1d(x.transpose(1, 2), weight("conv_1d.weight"), weight("conv_1d.bias"))[..., 0]
    return linear(F.gelu(linear(x, "proj_to_sam.0")), "proj_to_sam.2")
