"""Stage 1, alignment: the context module learns to prompt SAM (LENS, section 3.3).

The answer, with the true box, is given; the queries read it; the mask's BCE + dice train queries,
connector and projection. By default everything else is frozen, and SAM decodes as in evaluation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lens_jax.distribution.gradients import Layout, Metrics, differentiate
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensModel
from lens_jax.models.resample import upsample_logits, valid_pixels
from lens_jax.rewards.segment import answer_iou, no_target
from lens_jax.training.losses import segmentation_losses
from lens_jax.training.state import TrainState, apply

Update = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, Metrics]]


def sums(model: LensModel, batch: Batch, *, stability: bool = True) -> tuple[jax.Array, Metrics]:
    """The loss and the metrics, summed over samples; `stability` as in `LensModel.decode_masks`."""
    prompts, targets = batch.prompts, batch.targets
    embedded = model.embed(prompts)
    hidden = model.encode_queries(
        prompts, embedded, targets.answer[:, None], targets.answer_length[:, None]
    )
    masks = model.decode_masks(model.sam_features(prompts), hidden, stability=stability)
    canvas = targets.mask.shape[1:]
    logits = upsample_logits(masks.logits, targets.mask_size, canvas)
    valid = valid_pixels(targets.mask_size, canvas)
    cross_entropy, dice = segmentation_losses(logits, targets.mask, valid)
    nothing = no_target(targets.mask, targets.box, valid)
    iou = answer_iou(logits, targets.mask, valid, nothing)
    loss = jnp.sum(cross_entropy + dice)
    metrics = {
        "loss": loss,
        "mask_bce": cross_entropy.sum(),
        "mask_dice": dice.sum(),
        "mask_iou": iou.sum(),
    }
    return loss, metrics


def make_update(
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    layout: Layout | None = None,
    *,
    stability: bool = True,
) -> Update:
    """The update as a pure function `(state, frozen, batch) -> (state, metrics)`, to be jitted.

    Args:
        micro_batches, layout: as for `gradients.differentiate`.
    """

    def loss(params, frozen, batch):
        return sums(nnx.merge(definition, params, frozen), batch, stability=stability)

    def update(state: TrainState, frozen: nnx.State, batch: Batch):
        count = len(batch.sample_id)
        gradients, metrics = differentiate(loss, state.params, frozen, batch, micro_batches, layout)
        gradients, metrics = jax.tree.map(lambda x: x / count, (gradients, metrics))
        state, norm = apply(state, gradients, metrics["loss"], optimizer)
        return state, metrics | {"grad_norm": norm, "skipped_updates": state.skipped}

    return update
