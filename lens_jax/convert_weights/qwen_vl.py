"""The tensors of Qwen2-VL and Qwen2.5-VL: the vision tower and the language model."""

from typing import Any

from lens_jax.convert_weights.reader import Weights
from lens_jax.convert_weights.table import LINEAR, Entry, Table, WeightsError, flattened_conv
from lens_jax.convert_weights.values import difference
from lens_jax.model_configs.qwen_vl import tie_levels
from lens_jax.models.qwen_vl.config import QwenVLConfig

PREFIXES = ("visual.", "model.", "lm_head.")


def table(config: QwenVLConfig) -> Table:
    """Every tensor of a Qwen-VL of these shapes, in the official spelling."""
    vision = config.vision
    window = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    entries = [
        Entry(
            "visual.patch_embed.proj.weight", "visual/patch_embed/kernel", flattened_conv(*window)
        ),
        *_vision_norm(config, "visual.merger.ln_q", "visual/merger/norm"),
        *linear("visual.merger.mlp.0", "visual/merger/fc1"),
        *linear("visual.merger.mlp.2", "visual/merger/fc2"),
        Entry("model.embed_tokens.weight", "language/embed_tokens/embedding"),
        Entry("model.norm.weight", "language/norm/scale"),
    ]
    if not config.tie_word_embeddings:
        entries.append(Entry("lm_head.weight", "language/lm_head/embedding"))
    mlp = {"qwen2_vl": ("fc1", "fc2"), "qwen2_5_vl": ("gate_proj", "up_proj", "down_proj")}
    for i in range(vision.depth):
        source, target = f"visual.blocks.{i}", f"visual/blocks/{i}"
        entries += [
            *_vision_norm(config, f"{source}.norm1", f"{target}/norm1"),
            *_vision_norm(config, f"{source}.norm2", f"{target}/norm2"),
            *linear(f"{source}.attn.qkv", f"{target}/qkv"),
            *linear(f"{source}.attn.proj", f"{target}/proj"),
        ]
        for name in mlp[vision.family]:
            entries += linear(f"{source}.mlp.{name}", f"{target}/{name}")
    for i in range(config.num_layers):
        source, target = f"model.layers.{i}", f"language/layers/{i}"
        entries += [
            Entry(f"{source}.input_layernorm.weight", f"{target}/input_norm/scale"),
            Entry(
                f"{source}.post_attention_layernorm.weight", f"{target}/post_attention_norm/scale"
            ),
        ]
        for name in ("q_proj", "k_proj", "v_proj"):
            entries += linear(f"{source}.self_attn.{name}", f"{target}/{name}")
        entries += linear(f"{source}.self_attn.o_proj", f"{target}/o_proj", bias=False)
        for name in ("gate_proj", "up_proj", "down_proj"):
            entries += linear(f"{source}.mlp.{name}", f"{target}/{name}", bias=False)
    return Table(tuple(entries))


def _vision_norm(config: QwenVLConfig, source: str, target: str) -> list[Entry]:
    entries = [Entry(f"{source}.weight", f"{target}/scale")]
    if config.vision.family == "qwen2_vl":
        entries.append(Entry(f"{source}.bias", f"{target}/bias"))
    return entries


def linear(source: str, target: str, bias: bool = True) -> list[Entry]:
    """The entries of one linear layer."""
    entries = [Entry(f"{source}.weight", f"{target}/kernel", LINEAR)]
    return [*entries, Entry(f"{source}.bias", f"{target}/bias")] if bias else entries


def official_name(name: str) -> str:
    """The official spelling of a name that may be written as transformers >= 4.52 does."""
    for new, official in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(new):
            return official + name.removeprefix(new)
    return name


def settle_tie(hf: dict[str, Any], source: Weights) -> dict[str, Any]:
    """config.json whose levels agree on whether the embeddings are tied.

    Where they contradict each other, the weights decide: tied if there is no head of their own.
    """
    outer, inner = tie_levels(hf)
    if outer is None or inner is None or outer == inner:
        return hf
    head, embedding = source.get("lm_head.weight"), source.get("model.embed_tokens.weight")
    tied = head is None or (embedding is not None and not difference(head.load(), embedding.load()))
    nested = {**hf["text_config"], "tie_word_embeddings": tied}
    return {**hf, "tie_word_embeddings": tied, "text_config": nested}


def without_tied_head(source: Weights) -> Weights:
    """Leaves out a language-model head that repeats the embedding.

    Raises:
      WeightsError: the head is not the embedding, though the configuration ties them.
    """
    head, embedding = source.get("lm_head.weight"), source.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return source
    if difference(head.load(), embedding.load()):
        raise WeightsError(
            f"{source.where}: lm_head.weight differs from model.embed_tokens.weight, but "
            "config.json ties them; set tie_word_embeddings to false"
        )
    return source.select(lambda name: name != "lm_head.weight")
