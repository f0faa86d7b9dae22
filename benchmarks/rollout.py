"""Greedy completions: ours against transformers' generate, on the same weights and pictures.

Ours computes a prompt once for its group of G completions; generate takes each of the G copies as a
row of its own, picture included. The tokens of both must be identical before anything is timed, and
no end token shortens either side.

    python benchmarks/rollout.py --size small --device cpu --json rollout.json
"""

import argparse
import dataclasses
import os
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

from benchmarks import common
from lens_jax import checkpoints
from lens_jax.convert_weights.qwen_vl import table
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

    theirs = transformers_model(model, size).to(device)
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
        mm_token_type_ids=((ids == size.qwen["image_token_id"]) & (mask == 1)).int(),
    )

    def write():
        with torch.inference_mode():
            out = theirs.generate(
                **inputs, do_sample=False, min_new_tokens=case.tokens, max_new_tokens=case.tokens
            )
        return out[:, width:].cpu().numpy()

    return write


def transformers_model(model: LensModel, size: common.Size) -> Any:
    """Our weights as a Qwen2.5-VL of transformers, in the size's precision."""
    import torch
    import transformers

    params = dict(checkpoints.unstack(nnx.to_pure_dict(split_policy(model)[1])))
    tensors = {
        entry.source: torch.tensor(
            np.ascontiguousarray(entry.transform.inverse(params[entry.target].astype(np.float32)))
        )
        for entry in table(model.config.mllm).entries
    }
    theirs, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        None,
        config=transformers.AutoConfig.for_model(**size.qwen),
        state_dict=tensors,
        dtype=getattr(torch, jnp.dtype(size.dtype).name),
        output_loading_info=True,
    )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise ValueError(f"transformers has no place, or nothing, for {', '.join(wrong)}")
    theirs.generation_config.eos_token_id = None
    return theirs.eval()


def agree(ours: Int[np.ndarray, "B G T"], theirs: Int[np.ndarray, "N T"], exact: bool) -> None:
    """Raises SystemExit unless the tokens are the same; in bfloat16 it prints how many are."""
    same = ours.reshape(theirs.shape) == theirs
    print(f"identical tokens: {same.sum()} of {same.size}")
    if exact and not same.all():
        raise SystemExit("error: the sides write different tokens; nothing is timed")


def benchmark(options: argparse.Namespace) -> None:
    # PyTorch shares the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    common.use(options.device, options.size)
    size = common.SIZES[options.size]
    exact = size.dtype == jnp.float32
    model = common.random_model(size, dtype=size.dtype)
    rows = {}
    with jax.default_matmul_precision("highest" if exact else "default"):
        for name, case in cases(size):
            ours = in_jax(model, case)
            theirs = in_torch(model, size, case, {"cpu": "cpu", "gpu": "cuda"}[options.device])
            agree(np.asarray(ours()), theirs(), exact)
            seconds = common.interleaved({"ours": ours, "theirs": theirs}, options.repeats)
            rows[name] = common.faster(**seconds)
    precision = jnp.dtype(size.dtype).name
    title = f"rollout against transformers, size {options.size}, {precision}, {options.device}"
    common.report(title, rows, options.json)


def main(argv: Sequence[str] | None = None) -> int:
    return common.run(benchmark, common.parser(__doc__, repeats=5), argv)


if __name__ == "__main__":
    sys.exit(main())
