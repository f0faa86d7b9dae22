"""Both models on one random image: ours in JAX, and what the official code computes in PyTorch."""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import transformers
from flax import nnx

from lens_jax import checkpoints
from lens_jax.convert_weights import configs, qwen_vl
from lens_jax.convert_weights.official import Official
from lens_jax.convert_weights.reader import LazyTensor
from lens_jax.convert_weights.torch_models import connect, load_model, load_sam
from lens_jax.data.images import arrange_windows, patchify, window_layout
from lens_jax.data.prompts import rope_positions
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensConfig, LensModel, abstract
from lens_jax.models.qwen_vl.head import logits
from lens_jax.models.sam.config import Sam2Config
from lens_jax.models.sam.segmenter import PIXEL_MEAN, PIXEL_STD

# Tokens of text before the image's and after them, and after the prompt.
_BEFORE, _AFTER, _COMPLETION = 9, 6, 5


def run_both(
    checkpoint: Path, official: Official, tensors: Mapping[str, LazyTensor], seed: int = 0
) -> dict[str, float]:
    """Runs both models: output -> largest difference, as a fraction of the largest value.

    Args:
      checkpoint: ours.
      official: the configuration of the official weights.
      tensors: name in an official LENS checkpoint -> tensor. Without the context module only
        Qwen-VL's logits and, for a random prompt token, SAM's masks are compared.
    """
    config = checkpoints.model_shapes(checkpoint, checkpoints.read_config(checkpoint))
    inputs = _draw(config, official.config["mllm"], np.random.default_rng(seed))
    ours = _ours(checkpoint, config, inputs)
    theirs = _theirs(official, tensors, config, inputs, ours["SAM's prompt token"])
    return {
        name: float(np.abs(ours[name] - x).max() / np.abs(x).max()) for name, x in theirs.items()
    }


@dataclass(frozen=True)
class _Inputs:
    """A prompt with an image, and a completion.

    `patches` [N, C] with their `grid` are the image in transformers' order; SAM's image and all
    that our model needs are in `prompts`, a batch of one.
    """

    prompts: Prompts
    completion: np.ndarray
    patches: np.ndarray
    grid: tuple[int, int]


def _draw(config: LensConfig, hf: Mapping[str, Any], rng: np.random.Generator) -> _Inputs:
    vision, merge = config.mllm.vision, config.mllm.vision.merge_size
    units = vision.window_units
    # No multiple of the window: those at the border hold less.
    size = [(n * units + 1) * merge * vision.patch_size for n in (1, 2)]
    picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    half = (0.5, 0.5, 0.5)
    patches, grid = patchify(picture, half, half, vision)
    source, places, slots = window_layout(grid, units, merge)
    arranged, patch_mask = arrange_windows(patches, source)

    image = config.mllm.image_token_id
    start = hf.get("vision_start_token_id") or 151652  # the class's default
    end = hf.get("vision_end_token_id") or 151653
    before, after, completion = (
        rng.integers(0, min(image, start, end), n) for n in (_BEFORE, _AFTER, _COMPLETION)
    )
    tokens = np.concatenate([before, [start], np.full(len(slots), image), [end], after])
    image_index = np.full(len(tokens), -1)
    image_index[tokens == image] = slots
    first = len(before) + 1
    positions, following = rope_positions(len(tokens), first, (grid[0] // merge, grid[1] // merge))
    side = config.sam.image_size
    prompts = Prompts(
        patches=arranged,
        patch_positions=places,
        patch_mask=patch_mask,
        tokens=tokens.astype(np.int32),
        image_index=image_index.astype(np.int32),
        length=np.int32(len(tokens)),
        positions=positions,
        next_position=np.int32(following),
        sam_pixels=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
    )
    return _Inputs(
        jax.tree.map(lambda x: np.asarray(x)[None], prompts), completion.astype(np.int32),
        patches, grid,
    )  # fmt: skip


def _ours(checkpoint: Path, config: LensConfig, inputs: _Inputs) -> dict[str, np.ndarray]:
    _, params = checkpoints.load_pretrained(checkpoint, dtype=np.float32)
    params.pop("unused", None)
    definition, state = nnx.split(abstract(config))
    nnx.replace_by_pure_dict(state, params)

    outputs = _run(state, inputs.prompts, inputs.completion, definition=definition)
    return jax.tree.map(np.asarray, outputs)


@functools.partial(jax.jit, static_argnames="definition")
def _run(
    state: nnx.State, prompts: Prompts, completion: jax.Array, *, definition: nnx.GraphDef
) -> dict[str, jax.Array]:
    model: LensModel = nnx.merge(definition, state)
    embedded = model.embed(prompts)
    mask = jnp.ones(prompts.tokens.shape, bool)
    hidden, _ = model.language.prefill(embedded, prompts.positions, mask)
    lengths = jnp.full((1, 1), completion.shape[-1])
    score = model.score(prompts, embedded, completion[None, None], lengths, with_queries=True)
    masks = model.decode_masks(model.sam_features(prompts), score.hidden, stability=False)
    return {
        "logits": logits(hidden, model.language.head)[0],
        "SAM's prompt token": model.context(score.hidden)[0, 0],
        "mask logits": masks.all_logits[0, 0],
    }


def _theirs(
    official: Official,
    tensors: Mapping[str, LazyTensor],
    config: LensConfig,
    inputs: _Inputs,
    token: np.ndarray,
) -> dict[str, np.ndarray]:
    """The same in PyTorch; without a context module the masks are those that `token` prompts."""
    has_context = "learnable_query" in tensors
    with torch.no_grad():
        outputs, hidden = _run_mllm(official, tensors, config, inputs)
        prompt_token = torch.from_numpy(token.copy())
        if has_context:
            prompt_token = connect(
                lambda name: _torch(tensors[name]).float(),
                hidden,
                config.connector_depth,
                config.connector_heads,
            )[0]
            outputs["SAM's prompt token"] = prompt_token
        pixels = inputs.prompts.sam_pixels[0].astype(np.float32)
        pixels = torch.from_numpy((pixels - PIXEL_MEAN) / PIXEL_STD).permute(2, 0, 1)[None]
        outputs["mask logits"] = _run_sam(config, tensors, pixels, prompt_token)
    return {name: x.numpy() for name, x in outputs.items()}


def _run_mllm(official: Official, tensors, config: LensConfig, inputs: _Inputs):
    """Logits of the prompt, and the hidden states of the queries if there are any."""
    hf = configs.mllm_config(official.config, np.dtype(np.float32))
    names = [name for name in tensors if name.startswith(qwen_vl.PREFIXES)]
    model_class = getattr(transformers, hf["architectures"][0])
    model = load_model(model_class, hf, {name: _torch(tensors[name]) for name in names})
    prompts, ids = inputs.prompts, torch.from_numpy(inputs.prompts.tokens).long()
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(inputs.patches),
        "image_grid_thw": torch.tensor([(1, *inputs.grid)]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # transformers 5
        arguments["mm_token_type_ids"] = (ids == config.mllm.image_token_id).int()
    language, embedded = model.model.language_model, []
    hook = language.register_forward_pre_hook(
        lambda _, args, options: embedded.append(options["inputs_embeds"]), with_kwargs=True
    )
    outputs = {"logits": model(**arguments).logits[0]}
    hook.remove()
    if "learnable_query" not in tensors:
        return outputs, None

    own = language.embed_tokens(torch.from_numpy(inputs.completion).long())[None]
    queries = _torch(tensors["learnable_query"]).float()
    sequence = torch.cat([embedded[0], own, queries], dim=1)
    added = np.arange(own.shape[1] + queries.shape[1])
    if config.context_positions == "text":
        positions = np.broadcast_to(np.arange(sequence.shape[1]), (3, sequence.shape[1]))
    else:
        following = np.broadcast_to(prompts.next_position[0] + added, (3, len(added)))
        positions = np.concatenate([prompts.positions[0], following], axis=1)
    hidden = language(
        inputs_embeds=sequence,
        attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long),
        position_ids=torch.from_numpy(positions.copy()).long()[:, None],
    ).last_hidden_state
    return outputs, hidden[:, -queries.shape[1] :]


def _run_sam(config: LensConfig, tensors: Mapping[str, LazyTensor], pixels, token):
    """The low-resolution logits of all masks [4, h, w] for one prompt token [E]."""
    model = load_sam(config.sam, lambda name: _torch(tensors[name]))
    more = {}
    coarse = model.get_image_embeddings(pixels)
    if isinstance(config.sam, Sam2Config):
        *fine, coarse = coarse
        more = {"high_resolution_features": fine}
    no_mask = model.prompt_encoder.no_mask_embed.weight[..., None, None]
    # The decoder gives its first mask or the others; SAM 2's the first in training mode alone.
    masks = [
        model.mask_decoder.train(not multimask)(
            image_embeddings=coarse,
            image_positional_embeddings=model.get_image_wide_positional_embeddings(),
            sparse_prompt_embeddings=token[None, None, None],
            dense_prompt_embeddings=no_mask.expand_as(coarse),
            multimask_output=multimask,
            **more,
        )[0][0, 0]
        for multimask in (False, True)
    ]
    return torch.cat(masks)


def _torch(tensor: LazyTensor) -> torch.Tensor:
    """A tensor of PyTorch's from mapped values, copied."""
    x = np.array(tensor.load())
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)
