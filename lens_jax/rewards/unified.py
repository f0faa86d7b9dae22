"""The unified reward: sentence, box and mask in named channels (LENS, section 3.3)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lens_jax.config.sections import RewardsConfig
from lens_jax.models.inputs import Targets
from lens_jax.rewards.box import box_iou
from lens_jax.rewards.segment import answer_iou, boundary_iou, no_target
from lens_jax.rewards.sentence import FORMATS, TextScorer


@struct.dataclass
class Rewards:
    """Rewards of G completions of each prompt, float32 and without gradient."""

    values: Float[Array, "B G K"]
    """One channel each of `names`, before weights."""
    total: Float[Array, "B G"]
    """The weighted sum."""
    mask_iou: Float[Array, "B G"]
    box_iou: Float[Array, "B G"]
    names: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def channels(self) -> dict[str, Float[Array, "B G"]]:
        """The values of each channel by name."""
        return {name: self.values[..., k] for k, name in enumerate(self.names)}


@struct.dataclass
class Answers:
    """Inputs of a channel of one's own: B prompts with G completions each."""

    tokens: Int[Array, "B G T"]
    lengths: Int[Array, "B G"]
    """Tokens that count, end token included."""
    text: dict[str, Array]
    """Results of `text_rewards`: formats and box_found [B, G], box [B, G, 4]."""
    logits: Float[Array, "B G H W"]
    """Mask logits on the canvas of the target masks."""
    targets: Targets
    """mask [B, H, W], box [B, 4] in the text's coordinates."""
    valid: Bool[Array, "B H W"]
    """True on pixels of the canvas that belong to the image."""
    box_iou: Float[Array, "B G"]
    mask_iou: Float[Array, "B G"]


Channel = Callable[[Answers], Float[Array, "B G"]]


def check_channel(
    channel: Channel, *, generations: int, tokens: int, canvas: tuple[int, int]
) -> None:
    """Traces a channel of one's own as an update will, on shapes alone.

    Raises:
        ValueError: what it returns is not one number for each completion.
        Exception: whatever the channel raises.
    """
    shape = jax.ShapeDtypeStruct
    b, g = 2, generations
    each, pixels = partial(shape, (b, g)), partial(shape, (b, *canvas))
    text = dict.fromkeys((*FORMATS, "box_found"), each(bool)) | {
        "box": shape((b, g, 4), jnp.float32)
    }
    size, answer, one = (shape((b, *n), jnp.int32) for n in ((2,), (1,), ()))
    answers = Answers(
        tokens=shape((b, g, tokens), jnp.int32),
        lengths=each(jnp.int32),
        text=text,
        logits=shape((b, g, *canvas), jnp.float32),
        targets=Targets(shape((b, 4), jnp.float32), pixels(bool), size, answer, one),
        valid=pixels(bool),
        box_iou=each(jnp.float32),
        mask_iou=each(jnp.float32),
    )
    jax.eval_shape(partial(_earned, channel), answers)


def _earned(channel: Channel, answers: Answers) -> Float[Array, "B G"]:
    value, expected = jnp.asarray(channel(answers), jnp.float32), answers.lengths.shape
    if value.shape != expected:
        raise ValueError(
            f"reward channel {channel.__name__} returns shape {value.shape}, expected one number "
            f"for each completion, {expected}"
        )
    return value


@dataclasses.dataclass(frozen=True)
class UnifiedReward:
    """Weighs format, box, segment and boundary rewards; weight 0: not in the total.

    A sample without target (no box, an empty mask) is answered rightly by no box and an empty mask,
    which earn 1 each; anything else earns 0. Where neither mask has a boundary, the boundary reward
    is that of the whole masks.
    """

    score: TextScorer
    """Reads the text: `text_rewards(tokenizer)`."""
    settings: RewardsConfig
    custom: Sequence[Channel] = ()
    """The functions that `settings.custom` names; each channel is called like its function."""

    def __call__(
        self,
        tokens: Int[Array, "B G T"],
        lengths: Int[Array, "B G"],
        logits: Float[Array, "B G H W"],
        targets: Targets,
        valid: Bool[Array, "B H W"],
    ) -> Rewards:
        """Rewards completions and their masks.

        Args:
            lengths: tokens of each completion that count, end token included.
            logits: mask logits on the canvas of the target masks.
            valid: pixels of the canvas that belong to the image.
        """
        settings = self.settings
        text = self.score(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
        text = {name: v.reshape(*lengths.shape, *v.shape[1:]) for name, v in text.items()}
        nothing = no_target(targets.mask, targets.box, valid)
        box = box_iou(text["box"], targets.box[:, None])
        box = jnp.where(nothing[:, None], ~text["box_found"], box)
        segment = answer_iou(logits, targets.mask, valid, nothing)
        channels = {
            "format": (settings.format, text[settings.pattern].astype(jnp.float32)),
            "box": (settings.box, box),
            "segment": (settings.segment, segment),
        }
        if settings.boundary:
            boundary = boundary_iou(logits, targets.mask, valid, otherwise=segment)
            boundary = jnp.where(nothing[:, None], segment, boundary)
            channels["boundary"] = (settings.boundary, boundary)
        for channel, weight in zip(self.custom, settings.custom_weights, strict=True):
            answers = Answers(tokens, lengths, text, logits, targets, valid, box, segment)
            channels[channel.__name__] = (weight, _earned(channel, answers))

        weights = [weight for weight, _ in channels.values()]
        values = [v**2 if name in settings.squared else v for name, (_, v) in channels.items()]
        values = jnp.stack(values, axis=-1)
        total = settings.scale * (values * jnp.array(weights, jnp.float32)).sum(-1)
        rewards = Rewards(values, total, segment, box, names=tuple(channels))
        return jax.lax.stop_gradient(rewards)
