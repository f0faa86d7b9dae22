"""Makes the tiny SAM 2 that `make train` starts from.

    python -m tools.make_tiny_sam --output checkpoints/tiny/sam2

It is to LENS what sam2_hiera_large is to the real one: a model that segments from points and boxes,
here in generated images of shapes. Training has three parts. First the image encoder learns to
say what covers each spot of the image. Then, like SAM, the whole model learns masks with a pixel
and a dice loss on the single mask and on the others, and its own estimate of the IoU; heads that
are thrown away ask every mask token for box and kind of its object. Without those two helps a
prompt does not find its object in the time at hand: the masks are those of all objects at once.

At last the mask decoder alone learns masks with a margin, as a fine-tuned SAM might have learned
from careless labels: LENS trains the decoder on in stage 2, and a run of minutes should show it.

Prompts are points (one to three), boxes (tight or loose) and both, as SAM 2 feeds them, and single
points or boxes without the token that ends a list: LENS prompts SAM with one token alone.

Writes `sam2_config.json`, `model.safetensors` (original tensor names) and `training.json` (settings
and held-out mean IoU by prompt).
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import save_file
from tqdm import tqdm

from lens_jax.commands import cli
from lens_jax.convert_weights import sam2
from lens_jax.convert_weights.table import tensors_from
from lens_jax.flags import NonNegativeInt, PositiveFloat, PositiveInt
from lens_jax.model_configs.sam import write_sam
from lens_jax.models.sam.mask_decoder import SamMasks
from lens_jax.models.sam.segmenter import Sam2, SamFeatures
from lens_jax.preparation import shapes
from tools.tiny_sam_data import (
    CONFIG,
    KINDS,
    LENGTHS,
    PROMPTS,
    PromptTargets,
    SceneBatch,
    draw_batch,
    prompts_of,
)

# The image embedding has 8x8 cells where a large SAM's has 64x64: lower frequencies suffice.
POSITION_STD = 0.4


@dataclasses.dataclass(frozen=True)
class SamSettings:
    """Settings of the pre-training.

    Args:
      output: directory to write.
      dense_steps: steps of the first part, on twice as many images.
      steps: steps of the second part.
      loose_steps: steps of the third part.
      margin: pixels around the object in the masks of the third part.
      images: images a step; every image gets each kind of prompt twice.
      learning_rate: its peak; warm-up, then constant, in the second half linear decay.
      evaluation_scenes: held-out images, one object each.
      seed: seed of weights and data.
    """

    output: Path = Path("checkpoints/tiny/sam2")
    dense_steps: PositiveInt = 300
    steps: PositiveInt = 1000
    loose_steps: NonNegativeInt = 150
    margin: NonNegativeInt = 2
    images: PositiveInt = 8
    learning_rate: PositiveFloat = 2e-3
    evaluation_scenes: PositiveInt = 256
    seed: NonNegativeInt = 0


class Pretraining(nnx.Module):
    """The model with the heads that only pre-training needs."""

    def __init__(self, sam: Sam2, rngs: nnx.Rngs):
        dim, kinds = CONFIG.d_model, len(KINDS)
        per_cell = (CONFIG.mask_size // CONFIG.embedding_size) ** 2
        self.sam = sam
        self.coarse_cover = nnx.Linear(dim, per_cell * (1 + kinds), rngs=rngs)
        self.fine_cover = nnx.Linear(dim // 8, 1 + kinds, rngs=rngs)
        self.box = nnx.Linear(dim, 4, rngs=rngs)
        self.kind = nnx.Linear(dim, kinds, rngs=rngs)


def initial_sam(seed: int) -> Sam2:
    """Random weights under which prompts and cells of the image meet by position.

    Query and key projections between tokens and image start equal, and positions outweigh the
    other embeddings: attention begins as a similarity of places.
    """
    model = Sam2(CONFIG, rngs=nnx.Rngs(seed))
    prompts, decoder = model.sam_prompt_encoder, model.sam_mask_decoder
    attentions = [decoder.transformer.final_attn_token_to_image]
    for layer in decoder.transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    for attention in attentions:
        kernel = 2 * attention.q_proj.kernel[...]
        attention.q_proj.kernel[...] = kernel
        attention.k_proj.kernel[...] = kernel
    embeddings = [*prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed]
    embeddings += [decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens]
    for embed in embeddings:
        embed.embedding[...] = 0.3 * embed.embedding[...]
    for conv in model.image_encoder.neck.convs:
        conv.kernel[...] = 0.3 * conv.kernel[...]
    matrix = prompts.pe_layer.positional_encoding_gaussian_matrix
    matrix[...] = POSITION_STD * matrix[...]
    return model


def sparse_tokens(sam: Sam2, length: int, points: Float[Array, "B G N 2"]) -> Array:
    labels = np.array([PROMPTS[prompt] for prompt in prompts_of(length)])
    labels = labels.repeat(points.shape[1] // len(labels), axis=0)
    labels = np.broadcast_to(labels, points.shape[:-1])
    return sam.sam_prompt_encoder.embed_points(points, labels, pad=False)


def upsample(logits: Float[Array, "*batch h w"]) -> Float[Array, "*batch S S"]:
    return jax.image.resize(logits, (*logits.shape[:-2], shapes.SIDE, shapes.SIDE), "linear")


def dilate(masks: Bool[Array, "*batch S S"], margin: int) -> Bool[Array, "*batch S S"]:
    """The masks and every pixel at most `margin` rows and columns away."""
    flat = masks.reshape(-1, *masks.shape[-2:]).astype(jnp.float32)
    window = (1, 2 * margin + 1, 2 * margin + 1)
    return lax.reduce_window(flat, 0.0, lax.max, window, (1, 1, 1), "SAME").reshape(masks.shape) > 0


def iou(predicted: Bool[Array, "*batch S S"], true: Bool[Array, "*batch S S"]) -> Array:
    union = (predicted | true).sum((-2, -1))
    return (predicted & true).sum((-2, -1)) / jnp.maximum(union, 1)


def cover_loss(model: Pretraining, features: SamFeatures, cover: Int[Array, "B h w"]) -> Array:
    """Cross-entropy of the kind that covers each mask cell, by coarse and by finest features."""
    batch, cells, _, _ = features.image_embed.shape
    inner = CONFIG.mask_size // cells
    coarse = model.coarse_cover(features.image_embed)
    coarse = coarse.reshape(batch, cells, cells, inner, inner, -1).swapaxes(2, 3)
    coarse = coarse.reshape(batch, CONFIG.mask_size, CONFIG.mask_size, -1)
    fine = model.fine_cover(jax.nn.gelu(features.high_res[0]))
    weight = jnp.where(cover > 0, 4.0, 1.0)
    nll = optax.softmax_cross_entropy_with_integer_labels
    return (weight * (nll(coarse, cover) + nll(fine, cover))).mean()


def mask_loss(logits: Float[Array, "*batch S S"], true: Bool[Array, "*batch S S"]) -> Array:
    """Cross-entropy over the object's area + dice, per mask.

    With the mean over the image, or SAM's focal loss, a model from scratch first learns that
    small objects are not there and stays with that for long.
    """
    true = true.astype(jnp.float32)
    area = true.sum((-2, -1))
    p = jax.nn.sigmoid(logits)
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, true).sum((-2, -1)) / area
    dice = 1 - (2 * (p * true).sum((-2, -1)) + 1) / (p.sum((-2, -1)) + area + 1)
    return cross_entropy + dice


def object_loss(
    model: Pretraining, features: SamFeatures, sparse: Array, targets: PromptTargets
) -> Float[Array, "B G"]:
    """Box and kind of the object, asked of every mask token."""
    sam = model.sam
    # The mask decoder does the same; the compiler merges both.
    tokens, _ = sam.sam_mask_decoder.attend(
        features.image_embed,
        sam.sam_prompt_encoder.dense_pe(),
        sparse,
        sam.sam_prompt_encoder.no_mask()[None, None, None, None],
    )
    tokens = tokens[:, :, 2 : 3 + CONFIG.num_multimask_outputs]
    box = jnp.abs(model.box(tokens) - targets.boxes[:, :, None]).mean((-2, -1))
    kinds = jnp.broadcast_to(targets.kinds[:, :, None], tokens.shape[:3])
    kind = optax.softmax_cross_entropy_with_integer_labels(model.kind(tokens), kinds).mean(-1)
    return 10 * box + 0.5 * kind


def prompt_loss(
    model: Pretraining, features: SamFeatures, sparse: Array, targets: PromptTargets
) -> tuple[Float[Array, "B G"], Float[Array, "B G"]]:
    """Loss of each prompt, and the IoU of its single mask."""
    masks = model.sam.decode(features, sparse, stability=False)
    true = targets.masks[:, :, None]
    logits = upsample(masks.all_logits)
    per_mask, actual = mask_loss(logits, true), iou(logits > 0, true)
    multi = per_mask[..., 1:]
    loss = 2 * per_mask[..., 0] + multi.min(-1) + 0.3 * multi.mean(-1)
    loss += jnp.square(masks.iou - actual).mean(-1)
    loss += 0.2 * jax.nn.softplus(-masks.object_score)  # there always is an object
    return loss + object_loss(model, features, sparse, targets), actual[..., 0]


def dense_objective(model: Pretraining, batch: SceneBatch) -> tuple[Array, dict[str, Array]]:
    """The first part: the image encoder alone."""
    features = model.sam.encode(model.sam.normalize(batch.pixels))
    return cover_loss(model, features, batch.cover), {}


def mask_objective(
    model: Pretraining, batch: SceneBatch, margin: int = 0
) -> tuple[Array, dict[str, Array]]:
    """The second part: masks from prompts; with a margin of some pixels, the third."""
    features = model.sam.encode(model.sam.normalize(batch.pixels))
    losses, ious = [], []
    for length, points, targets in zip(LENGTHS, batch.points, batch.targets, strict=True):
        sparse = sparse_tokens(model.sam, length, points)
        targets = targets.replace(masks=dilate(targets.masks, margin))
        loss, single = prompt_loss(model, features, sparse, targets)
        losses.append(loss)
        ious.append(single)
    loss = jnp.concatenate(losses, axis=1).mean()
    loss += 0.5 * cover_loss(model, features, batch.cover)
    return loss, {"iou": jnp.concatenate(ious, axis=1).mean()}


def optimize(
    model: Pretraining,
    objective: Callable[[Pretraining, SceneBatch], tuple[Array, dict[str, Array]]],
    schedule: optax.Schedule,
    steps: PositiveInt,
    draw: Callable[[], SceneBatch],
    name: str,
    trained: Callable[[tuple, Any], bool] = lambda path, _: True,
) -> tuple[Pretraining, list[float]]:
    """Adam on new batches, for the parameters that are `trained`; the model and every loss."""
    graph, params, frozen = nnx.split(model, trained, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, frozen, batch):
        def loss(params):
            return objective(nnx.merge(graph, params, frozen), batch)

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, {"loss": value} | metrics

    losses = []
    for _ in (progress := tqdm(range(steps), desc=name, mininterval=2.0)):
        params, state, metrics = step(params, state, frozen, draw())
        losses.append(float(metrics["loss"]))
        progress.set_postfix({key: f"{float(value):.3f}" for key, value in metrics.items()})
    return nnx.merge(graph, params, frozen), losses


def in_mask_decoder(path: tuple, _: Any) -> bool:
    return path[:2] == ("sam", "sam_mask_decoder")


def loosen(model: Pretraining, settings: SamSettings, rng: np.random.Generator) -> Pretraining:
    """The third part: the mask decoder alone learns masks with a margin."""
    peak, steps = settings.learning_rate / 4, settings.loose_steps
    return optimize(
        model,
        partial(mask_objective, margin=settings.margin),
        optax.linear_schedule(peak, 0.05 * peak, steps),
        steps,
        lambda: draw_batch(rng, settings.images, 2),
        "loose masks",
        trained=in_mask_decoder,
    )[0]


def train(settings: SamSettings) -> tuple[Sam2, list[float]]:
    """Trains from scratch; the model and the losses of the second part."""
    peak, steps = settings.learning_rate, settings.steps
    model = nnx.jit(lambda: Pretraining(initial_sam(settings.seed), nnx.Rngs(settings.seed + 1)))()
    rng = np.random.default_rng([settings.seed, 0])
    model, _ = optimize(
        model,
        dense_objective,
        optax.cosine_decay_schedule(1.5 * peak, max(settings.dense_steps, 1), alpha=0.3),
        settings.dense_steps,
        lambda: draw_batch(rng, 2 * settings.images, 1),
        "image encoder",
    )
    warmup = min(50, steps // 4)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.05 * peak, steps - steps // 2),
        ],
        [warmup, steps // 2],
    )
    model, losses = optimize(
        model,
        mask_objective,
        schedule,
        steps,
        lambda: draw_batch(rng, settings.images, 2),
        "masks from prompts",
    )
    return loosen(model, settings, rng).sam, losses


def evaluate(sam: Sam2, settings: SamSettings) -> dict[str, float]:
    """Held-out mean IoU of each way to prompt, with and without the stability rule."""
    graph, params = nnx.split(sam)

    def segment(sam: Sam2, batch: SceneBatch, stability: bool) -> list[SamMasks]:
        features = sam.encode(sam.normalize(batch.pixels))
        return [
            sam.decode(features, sparse_tokens(sam, length, points), stability=stability)
            for length, points in zip(LENGTHS, batch.points, strict=True)
        ]

    @partial(jax.jit, static_argnames="stability")
    def ious(params, batch, stability):
        results = segment(nnx.merge(graph, params), batch, stability)
        return [
            iou(upsample(masks.logits) > 0, targets.masks).mean(0)
            for masks, targets in zip(results, batch.targets, strict=True)
        ]

    rng = np.random.default_rng([settings.seed, 1])
    size = min(settings.evaluation_scenes, 32)
    batches = [draw_batch(rng, size, 1) for _ in range(settings.evaluation_scenes // size)]
    names = [prompt for length in LENGTHS for prompt in prompts_of(length)]
    scores = {}
    for stability in (False, True):
        means = np.mean([np.concatenate(ious(params, b, stability)) for b in batches], axis=0)
        suffix = ", stability rule" if stability else ""
        scores |= {name + suffix: float(x) for name, x in zip(names, means, strict=True)}
    return scores


def save(sam: Sam2, directory: Path) -> None:
    """Writes the configuration and the weights in the original layout."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sam2_config.json").write_text(json.dumps(write_sam(CONFIG), indent=1) + "\n")
    tensors = tensors_from(sam2.table(CONFIG), nnx.to_pure_dict(nnx.state(sam)))
    save_file(tensors, directory / "model.safetensors")


def make(settings: SamSettings) -> None:
    """Trains, writes and scores the model."""
    cli.announce(settings.output, "float32")
    start = time.perf_counter()
    sam, losses = train(settings)
    seconds = time.perf_counter() - start
    save(sam, settings.output)
    scores = evaluate(sam, settings)
    record = dataclasses.asdict(settings) | {
        "output": str(settings.output),
        "first_loss": round(losses[0], 3),
        "last_loss": round(losses[-1], 3),
        "seconds": round(seconds),
        "held_out_mean_iou": {name: round(score, 4) for name, score in scores.items()},
    }
    (settings.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, score in scores.items():
        print(f"{name:30s} held-out mean IoU {score:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_settings(make, SamSettings, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
