"""Greedy completions: ours against transformers' generate, on the same weights and images.

Ours computes a prompt once for its group of G completions; generate takes each of the G copies as a
row of its own, image included. The tokens of both must be identical before anything is timed, and
no end token shortens either side.

    python benchmarks/rollout.py --size small --device cpu --json rollout.json
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from benchmarks import common, frame
from lens_jax.models.lens import LensModel, split_policy
from lens_jax.rollout.sampler import rollout
from lens_jax.rollout.sampling import GREEDY

NO_END = (-1,)  # ends no completion


@dataclasses.dataclass(frozen=True)
class Case:
    """Prompts of `lengths` tokens, G completions of T tokens each."""

    inputs: common.Inputs
    grid: tuple[int, int]
    group: int
    tokens: int


def cases(size: common.Size) -> Iterator[tuple[str, Case]]:
    """Groups of a long prompt with short and long completions; 16 different short prompts."""
    inputs = common.random_inputs(size)
    for tokens in (size.completion, size.reasoning):
        name = f"{size.groups} x {size.prompt} + {tokens}, G = {size.group}"
        yield name, Case(inputs, size.grid, size.group, tokens)
    grid = (4, 6)
    lengths = [16 + i for i in range(16)]
    short = common.random_inputs(size, grid=grid, lengths=lengths)
    name = f"16 prompts of {lengths[0]} to {lengths[-1]} + {size.completion}, G = 1"
    yield name, Case(short, grid, 1, size.completion)


def in_jax(model: LensModel, case: Case) -> Callable[[], jax.Array]:
    """Ours: from patches to tokens [B, G, T] in one program."""
    definition, policy, rest = split_policy(model)
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)

    @jax.jit
    def write(policy, prompts, sample_id):
        model = nnx.merge(definition, policy, rest)
        return rollout(
            model,
            prompts,
            model.embed(prompts),
            sample_id,
            jax.random.key(0),
            num_completions=case.group,
            max_new_tokens=case.tokens,
            end_tokens=NO_END,
            sampling=GREEDY,
        ).tokens

    prompts = jax.device_put(case.inputs.prompts)
    sample_id = jnp.arange(len(case.inputs.prompts.tokens))
    return lambda: write(policy, prompts, sample_id)


def in_torch(model: LensModel, size: common.Size, case: Case, device: str) -> Callable[[], Any]:
    """transformers' generate on left-padded rows, each prompt G times: tokens [B * G, T]."""
    import torch

    from benchmarks.official_torch import load_qwen, official_tensors

    tensors = official_tensors(model.config, split_policy(model)[1])
    theirs = load_qwen(size, tensors, dtype=jnp.dtype(size.dtype).name).to(device).eval()
    theirs.generation_config.eos_token_id = None
    prompts, copies = case.inputs.prompts, case.group
    width = prompts.tokens.shape[1]
    ids = np.stack(
        [np.roll(row, width - n) for row, n in zip(prompts.tokens, prompts.length, strict=True)]
    )
    mask = np.arange(width) >= width - prompts.length[:, None]
    rows = lambda x: torch.tensor(np.repeat(x, copies, axis=0)).to(device)  # noqa: E731
    ids, mask, patches = rows(ids).long(), rows(mask).long(), rows(case.inputs.patches)
    inputs = dict(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=patches.flatten(0, 1).to(theirs.dtype),
        image_grid_thw=torch.tensor([(1, *case.grid)] * len(ids)).to(device),
        mm_token_type_ids=((ids == size.qwen.image_token_id) & (mask == 1)).int(),
    )

    def write():
        with torch.inference_mode():
            out = theirs.generate(
                **inputs, do_sample=False, min_new_tokens=case.tokens, max_new_tokens=case.tokens
            )
        return out[:, width:].cpu().numpy()

    return write


def agree(ours: Int[np.ndarray, "B G T"], theirs: Int[np.ndarray, "N T"], exact: bool) -> None:
    """Raises SystemExit unless the tokens are the same; in bfloat16 it prints how many are."""
    same = ours.reshape(theirs.shape) == theirs
    print(f"identical tokens: {same.sum()} of {same.size}")
    if exact and not same.all():
        frame.stop("the sides write different tokens")


def measure(options: frame.Options) -> tuple[str, dict[str, frame.Comparison]]:
    rows = {}
    with frame.on_device(options) as size:
        model = common.random_model(size)
        for name, case in cases(size):
            ours = in_jax(model, case)
            theirs = in_torch(model, size, case, frame.PLATFORMS[options.device])
            agree(np.asarray(ours()), theirs(), exact=size.dtype == jnp.float32)
            rows[name] = frame.compare(ours, theirs, options.repeats)
    return f"rollout against transformers, {frame.setting(options)}", rows


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, frame.Options, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
