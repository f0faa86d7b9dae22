"""Text rewards on the device against Python's `re` on the host.

The host fetches the tokens, decodes them, searches the texts as the official code does, and sends
four arrays back. Both sides must find the same in every completion before anything is timed. The
last row sets the rewards of one update's completions beside that update.

    python benchmarks/rewards.py --size small --device cpu --json rewards.json

With --chip they are compiled for a TPU instead (libtpu's compiler runs on any machine): nothing is
timed, but the bytes that they move are counted.

    python benchmarks/rewards.py --chip v5e
"""

import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401
from lens_jax.models.parameters import select

# isort: split
import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Int

from benchmarks import common, frame, update
from benchmarks.official_text import expected
from lens_jax.aot import hlo
from lens_jax.data.processor_files import read_tokenizer
from lens_jax.flags import PositiveInt
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import split_policy
from lens_jax.preparation.shapes import all_sentences
from lens_jax.rewards import text_rewards
from lens_jax.rewards.sentence import TextRewards

TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny" / "qwen2_5_vl"
SHAPES = {"tiny": (16, 192), "small": (512, 768), "3b": (512, 768)}  # completions, tokens of each

Arguments = tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N"]]


@dataclasses.dataclass(frozen=True)
class RewardsOptions(frame.Options):
    repeats: PositiveInt = 9
    chip: frame.Chip | None = None
    """Compile for this TPU instead."""


def thoughts(encode: Callable[[str], list[int]], count: int, tokens: int) -> Arguments:
    """Completions that think and answer, places among their words; one in four is malformed."""
    rng = random.Random(0)
    sentences = all_sentences()

    def place() -> str:
        x, y = rng.randrange(300), rng.randrange(300)
        return f"({x}, {y}), ({x + rng.randrange(99)}, {y + rng.randrange(99)})"

    def write(number: int) -> list[int]:
        end = "<|box_end|>" if number % 4 else ""
        answer = encode(
            f"</think>\n<|object_ref_start|>{rng.choice(sentences)}<|object_ref_end|>"
            f"<|box_start|>{place()}{end}<|im_end|>"
        )
        thought = encode("<think>")
        while len(thought) + len(answer) < tokens:
            aside = f", about {place()}" if rng.random() < 0.1 else ""
            thought += encode(f" I see {rng.choice(sentences)}{aside}.")
        return (thought[: max(0, tokens - len(answer))] + answer)[:tokens]

    rows = np.array([write(number) for number in range(count)], np.int32)
    return rows, np.full(count, tokens, np.int32)


def digits(encode: Callable[[str], list[int]], count: int, tokens: int) -> Arguments:
    """The hardest case: every token may belong to a box, so none can be passed over."""
    rng = random.Random(0)
    pieces = [encode(piece)[0] for piece in "[](),-.0123456789"]
    rows = np.array([rng.choices(pieces, k=tokens) for _ in range(count)], np.int32)
    return rows, np.full(count, tokens, np.int32)


def on_host(tokenizer: Any, tokens: jax.Array, lengths: jax.Array) -> TextRewards:
    """The rewards by Python's `re`, from the device and back to it."""
    rows = zip(*jax.device_get((tokens, lengths)), strict=True)
    texts = tokenizer.batch_decode(
        [row[:length] for row, length in rows], clean_up_tokenization_spaces=False
    )
    found = [expected(text) for text in texts]
    boxes = [row.pop("box") for row in found]
    out = {name: np.array([row[name] for row in found]) for name in found[0]}
    out["box"] = np.array([box or [0] * 4 for box in boxes], np.float32)
    out["box_found"] = np.array([box is not None for box in boxes])
    return jax.device_put(out)


def agree(ours: TextRewards, theirs: TextRewards) -> None:
    """Raises SystemExit unless both found the same."""
    ours, theirs = jax.device_get((ours, theirs))
    for name, values in theirs.items():
        if not np.array_equal(ours[name], values):
            frame.stop(f"{name} differs between the sides")
    counts = {name: int(values.sum()) for name, values in theirs.items() if name != "box"}
    print(f"of {len(theirs['box'])} completions:", *(f"{n} {name}," for name, n in counts.items()))


def one_update(size: common.Size) -> Callable[[], Any]:
    """One update of this size, whose own rewards are given and cost nothing."""
    config = size.config()
    inputs, rollout = common.random_inputs(size), update.random_rollout(size, size.completion)
    earned = np.random.default_rng(2).random(rollout.lengths.shape, np.float32)
    program = update.updates(config, size.dtype, update.given(earned))
    model = common.random_model(size, weights=np.float32)
    _, trained, frozen = nnx.split(model, select(update.GRPOConfig().trained), ...)
    reference = jax.tree.map(lambda x: x.astype(size.dtype), split_policy(model)[1])
    batch = Batch(inputs.prompts, inputs.targets, np.arange(size.groups, dtype=np.int32))
    return update.JaxSide(program.ours, trained, frozen, reference, batch, rollout).step


def against_host(options: RewardsOptions) -> dict[str, frame.Comparison]:
    """Rows of the table."""
    tokenizer = read_tokenizer(TOKENIZER)[0]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    score = jax.jit(text_rewards(tokenizer))
    rows = {}
    count, tokens = SHAPES[options.size]
    with frame.on_device(options) as size:
        for name, make in {"thoughts": thoughts, "digits and brackets": digits}.items():
            arguments = jax.device_put(make(encode, count, tokens))
            ours, theirs = partial(score, *arguments), partial(on_host, tokenizer, *arguments)
            agree(ours(), theirs())
            name = f"{count} x {tokens} tokens, {name}"
            rows[name] = frame.compare(ours, theirs, options.repeats)
        shape = size.groups, size.group, size.reasoning
        arguments = jax.device_put(thoughts(encode, size.groups * size.group, size.reasoning))
        name = " x ".join(map(str, shape)) + " tokens, and an update"
        rows[name] = frame.compare(partial(score, *arguments), one_update(size), options.repeats)
    return rows


def compiled(chip: str, size: common.SizeName) -> None:
    """Prints what the rewards move on a TPU of this kind."""
    count, tokens = SHAPES[size]
    score = text_rewards(read_tokenizer(TOKENIZER)[0])
    place = SingleDeviceSharding(frame.chip(chip, size))
    shapes = (
        jax.ShapeDtypeStruct(shape, np.int32, sharding=place)
        for shape in [(count, tokens), (count,)]
    )
    module = hlo.Module(jax.jit(score).lower(*shapes).compile().as_text())
    fixed, each = module.traffic(unknown_trips=0), module.traffic(unknown_trips=1)
    print(f"{count} completions of {tokens} tokens, compiled for {chip}, HBM traffic:")
    print(f"  outside of loops: {fixed / (count * tokens):8.2f} bytes a token")
    print(f"  one turn of all loops: {(each - fixed) / count:8.2f} bytes a completion")
    most = (fixed + tokens * (each - fixed)) / (count * tokens)
    print(f"  if every token counts: {most:8.2f} bytes a token, the most there can be")


def measure(options: RewardsOptions) -> tuple[str, dict[str, frame.Comparison]]:
    if options.chip:
        compiled(options.chip, options.size)
        return "", {}
    title = f"text rewards on the device (ours) and on the host, {frame.setting(options)}"
    return title, against_host(options)


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, RewardsOptions, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
