"""Makes the tiny Qwen2.5-VL that `make train` starts from.

    python -m tools.make_tiny_vlm --output checkpoints/tiny/qwen2_5_vl

It is to LENS what Qwen2.5-VL-3B-Instruct is to the real one: it picks the object that an expression
names, most of the time, and writes its box as text, loosely. Supervised training from scratch on
generated scenes, in three parts: the vision tower learns to say what is centred in each cell of an
image; then answers are taught, with a loss that draws two heads to the object meant (plain
supervised training binds words to objects too slowly); last, with boxes enlarged at random, because
tightening them is what reinforcement learning is to show. Expressions that the held-out splits
reserve (`shapes.is_held_out`) are never used.

Images come in several shapes and on plain backgrounds, too. Their size does not matter: the
processor's limits (`preprocessor_config.json`) bring each to about 112 x 112 pixels.

The shipped weights took three calls: 700 vision steps and 2,080 tight ones at the constant peak
rate, of which the weights after 2,000 were taken; from there 1,000 tight steps whose rate fell in
their second half, then 600 loose ones (`--start`, `--seed 1` and `--seed 2`); all of these with
the images of `make train` alone. Then, with all kinds of images, `--vision_steps 0
--tight_steps 1600 --loose_steps 500 --learning_rate 1.2e-3 --seed 3`.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tqdm import tqdm

from lens_jax import checkpoints
from lens_jax.commands import cli
from lens_jax.convert_weights import qwen_vl
from lens_jax.data import images
from lens_jax.flags import NonNegativeInt, PositiveFloat, PositiveInt, UsageError
from lens_jax.model_configs.qwen_vl import read_qwen_vl
from lens_jax.models import layers
from lens_jax.models.attention import Prefix, attention, heads_first
from lens_jax.models.qwen_vl.config import QwenVLConfig
from lens_jax.models.qwen_vl.head import token_log_probs
from lens_jax.models.qwen_vl.language import LanguageModel
from lens_jax.models.qwen_vl.vision import VisionTower
from tools.tiny_vlm_data import CELLS, Writer, batches, make_pool

HF_CONFIG = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 448,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    # Positions span tens, not thousands: with Qwen's 1e6 most frequences would stand still.
    "rope_theta": 30.0,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1, 2],
        "hidden_act": "silu",
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}
SUPERVISED_LAYER = 1
TENS = 24  # of a coordinate


@dataclasses.dataclass(frozen=True)
class VlmSettings:
    """How long and how fast.

    Attributes:
        output: folder with the tokenizer, where config.json and model.safetensors are written.
        scenes: images to draw; all parts of the training go over them.
        vision_steps: steps of the vision tower alone, 48 images each.
        tight_steps: steps with true boxes, 16 images of 4 questions each.
        loose_steps: steps with enlarged boxes.
        learning_rate: peak; decays linearly to a tenth over the second half of tight_steps.
        start: a safetensors file to start from instead of random weights.
        seed: of scenes, weights and order.
    """

    output: Path = Path("checkpoints/tiny/qwen2_5_vl")
    scenes: PositiveInt = 24_000
    vision_steps: NonNegativeInt = 600
    tight_steps: NonNegativeInt = 3_000
    loose_steps: NonNegativeInt = 600
    learning_rate: PositiveFloat = 1.5e-3
    start: Path | None = None
    seed: NonNegativeInt = 0


class TinyVLM(nnx.Module):
    """Vision tower and language model, with throw-away heads for the first part."""

    def __init__(self, config: QwenVLConfig, rngs: nnx.Rngs):
        self.visual = VisionTower(config.vision, rngs=rngs)
        self.language = LanguageModel(config, rngs=rngs)
        self.cells = nnx.Linear(config.hidden_size, 16 + 4 * (TENS + 10), rngs=rngs)


# ---- losses -------------------------------------------------------------------------------------


def see(model: TinyVLM, batch: dict) -> jax.Array:
    """Merged tokens [B, 16, D] of the cells, row by row; those past the last are arbitrary."""
    mean, std = (np.float32(x)[:, None] for x in (images.MEAN, images.STD))
    x = (batch["patches"] / 255.0 - mean) / std
    x = jnp.repeat(x[:, None, :, :, None], 2, axis=4).reshape(len(x), 1, x.shape[1], -1)
    seen = model.visual(x, batch["places"].astype(jnp.int32)[:, None], batch["mask"][:, None])
    return jnp.take_along_axis(seen, batch["order"].astype(jnp.int32)[..., None], axis=1)


def is_cell(batch: dict) -> jax.Array:
    """Which of the 16 cells the image has, bool [B, 16]."""
    return jnp.arange(CELLS) < jnp.prod(batch["grid"].astype(jnp.int32), axis=1)[:, None]


def cell_loss(model: TinyVLM, seen: jax.Array, batch: dict) -> jax.Array:
    """The object centred in each cell, and its box in digits."""
    parts = jnp.split(model.cells(seen), [16, 16 + 4 * TENS], axis=-1)
    nll = optax.softmax_cross_entropy_with_integer_labels
    present = is_cell(batch)
    loss = jnp.sum(nll(parts[0], batch["cell_class"]) * present) / present.sum()
    here = (batch["cell_class"] > 0)[..., None]
    for logits, digit in zip(parts[1:], jnp.divmod(batch["cell_box"], 10), strict=True):
        logits = logits.reshape(*logits.shape[:-1], 4, -1)
        loss += jnp.sum(nll(logits, digit) * here) / (4 * here.sum())
    return loss


def answer_loss(
    model: TinyVLM, seen: jax.Array, batch: dict, prefix: jax.Array, first_image: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of answers, and how far the supervised heads look past the object."""
    language, tokens = model.language, batch["tokens"]
    b, g, s = tokens.shape
    answer, start, end = (batch["spans"][..., i, None] for i in range(3))
    prompt = jnp.broadcast_to(language.embed_tokens(prefix), (b, len(prefix), seen.shape[-1]))
    prompt = prompt.at[:, first_image : first_image + CELLS].set(seen)
    p = len(prefix)
    inside = slice(first_image, first_image + CELLS)
    grid = batch["grid"].astype(jnp.int32)
    rows, columns = jnp.divmod(jnp.arange(CELLS), grid[:, 1:])
    positions = jnp.broadcast_to(jnp.arange(p), (b, 3, p))
    positions = positions.at[:, :, inside].set(
        first_image + jnp.stack([0 * rows, rows, columns], axis=1)
    )
    positions = positions.at[:, :, inside.stop :].add(grid.max(1)[:, None, None] - CELLS)
    own = positions[:, :, -1:] + 1 + np.arange(g * s) % s
    rotation = language.rotation(jnp.concatenate([positions, own], -1))
    causal = np.tri(s, dtype=bool)[None, None]
    there = jnp.ones((b, p), bool).at[:, inside].set(is_cell(batch))
    alone = np.tri(p, dtype=bool) & there[:, None, None]

    x = jnp.concatenate([prompt, language.embed_tokens(tokens).reshape(b, g * s, -1)], 1)
    for i in range(language.config.num_layers):
        layer = layers.layer(language.layers, i)
        parts = layer.project(x, rotation)
        before = [y[:, None, :p] for y in parts]
        after = [y[:, p:].reshape(b, g, s, *y.shape[2:]) for y in parts]
        shared = Prefix(*(heads_first(y[:, 0]) for y in before[1:]), there)
        if i == SUPERVISED_LAYER:
            # Values that are one-hot in the cells turn attention's output into its weights.
            cells = jnp.zeros((1, 1, p, CELLS)).at[:, 0, inside].set(jnp.eye(CELLS))
            looking = Prefix(shared.keys[:, :1], jnp.tile(cells, (b, 1, 1, 1)), shared.mask)
            nothing = jnp.zeros((b, g, s, 1, CELLS))
            heads = after[0].shape[3] // after[1].shape[3]
            weights = attention(
                after[0][..., :heads, :], after[1][..., :1, :], nothing, causal, looking
            )
        seen_own = attention(*after, causal, shared).reshape(b, g * s, *after[0].shape[3:])
        x = layer.combine(x, jnp.concatenate([attention(*before, alone)[:, 0], seen_own], 1))
    hidden = language.norm(x)[:, p:].reshape(b, g, s, -1)

    log_probs, _ = token_log_probs(hidden[:, :, :-1], language.head, tokens[:, :, 1:])
    place = jnp.arange(1, s)
    counted = (place >= answer) & (place < end)
    nll = -jnp.sum(log_probs * counted) / counted.sum()
    target = jax.nn.one_hot(batch["cells"], CELLS)
    mass = jnp.einsum("bgshc,bgc->bgs", weights, target) / weights.shape[3]
    writing = (jnp.arange(s) >= start) & (jnp.arange(s) < end - 2)
    drawn = -jnp.sum(jnp.log(mass + 1e-6) * writing) / writing.sum()
    return nll, drawn


# ---- training -----------------------------------------------------------------------------------


def train(settings: VlmSettings) -> dict:
    """Runs the three parts; writes config.json and model.safetensors; returns the last losses."""
    writer = Writer(settings.output)
    special = {name: writer.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in (
        "endoftext", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
    )}  # fmt: skip
    hf_config = HF_CONFIG | {
        "bos_token_id": special["endoftext"],
        "eos_token_id": special["im_end"],
        "vision_start_token_id": special["vision_start"],
        "vision_end_token_id": special["vision_end"],
        "vision_token_id": special["vision_pad"],
        "image_token_id": special["image_pad"],
        "video_token_id": special["video_pad"],
    }
    config = read_qwen_vl(hf_config)
    model = TinyVLM(config, nnx.Rngs(settings.seed))
    if settings.start:
        _load(model, config, settings.start)
    definition, state = nnx.split(model)
    pool = make_pool(settings.scenes, settings.seed)
    prefix = jnp.asarray(writer.prefix)

    def vision_loss(state, batch, _):
        model = nnx.merge(definition, state)
        loss = cell_loss(model, see(model, batch), batch)
        return loss, (loss,)

    def language_loss(state, batch, aid):
        model = nnx.merge(definition, state)
        seen = see(model, batch)
        nll, drawn = answer_loss(model, seen, batch, prefix, writer.first_image)
        cells = cell_loss(model, seen, batch)
        return nll + 0.3 * drawn + 0.3 * aid * cells, (nll, drawn, cells)

    def part(name, loss, state, steps, size, rate, loose=False, aided=0.0):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(state, moments, batch, aid):
            (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state, batch, aid)
            change, moments = optimizer.update(gradient, moments, state)
            return optax.apply_updates(state, change), moments, jnp.stack(parts)

        moments, smooth = optimizer.init(state), None
        data = batches(pool, writer, size, loose, settings.seed + 1)
        for step in (bar := tqdm(range(steps), name, file=sys.stderr, mininterval=5)):
            aid = max(0.0, 1.0 - step / max(1.0, aided * steps))
            state, moments, parts = update(state, moments, next(data), aid)
            if step % 20 == 0 or step == steps - 1:
                parts = np.asarray(parts)
                if not np.isfinite(parts).all():
                    raise FloatingPointError(f"{name}: loss {parts} at step {step}")
                smooth = parts if smooth is None else 0.8 * smooth + 0.2 * parts
                bar.set_postfix_str(" ".join(f"{v:.3f}" for v in smooth))
            if step % 500 == 499:
                _save(nnx.merge(definition, state), config, hf_config, settings.output)
        return state, smooth

    peak, tight = settings.learning_rate, settings.tight_steps
    ramp = optax.linear_schedule(0.0, 2e-3, min(50, settings.vision_steps + 1))
    state, seen = part("vision", vision_loss, state, settings.vision_steps, 48, ramp)
    warm = optax.linear_schedule(0.0, peak, min(100, tight + 1))
    falling = optax.linear_schedule(peak, peak / 10, tight - tight // 2)
    rate = optax.join_schedules([warm, falling], [tight // 2])
    state, exact = part("tight", language_loss, state, tight, 16, rate, aided=0.5)
    rate = optax.linear_schedule(peak / 3, peak / 30, settings.loose_steps)
    state, loose = part("loose", language_loss, state, settings.loose_steps, 16, rate, loose=True)
    _save(nnx.merge(definition, state), config, hf_config, settings.output)
    return {"vision": seen, "tight": exact, "loose": loose}


def _save(model: TinyVLM, config: QwenVLConfig, hf_config: dict, output: Path) -> None:
    flat = dict(checkpoints.unstack(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    tensors = {
        entry.source: np.ascontiguousarray(entry.transform.inverse(np.asarray(flat[entry.target])))
        for entry in qwen_vl.table(config).entries
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")


def _load(model: TinyVLM, config: QwenVLConfig, file: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(file)
    flat = {e.target: e.transform.forward(tensors[e.source]) for e in qwen_vl.table(config).entries}
    nnx.update(model, nnx.State(checkpoints.stack(flat)))


def make(settings: VlmSettings) -> None:
    """Trains and writes the model."""
    if not (settings.output / "tokenizer.json").is_file():
        raise UsageError(
            f"{settings.output} holds no tokenizer.json: first run "
            f"python -m tools.make_tiny_tokenizer --output {settings.output}"
        )
    cli.announce(settings.output, "float32")
    losses = train(settings)
    for name, values in losses.items():
        print(name, " ".join(f"{v:.3f}" for v in values) if values is not None else "-")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run_settings(make, VlmSettings, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
