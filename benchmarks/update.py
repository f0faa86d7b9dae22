"""The update of stage 2 against the official layout, in JAX and in PyTorch.

One update of a group of G completions on the same weights, inputs, completions and rewards: score
by policy and reference, masks, losses, gradients, clipping, AdamW. Losses and gradient norms of all
sides must agree before anything is timed. Weights are drawn at random. The side in PyTorch needs
torch and transformers, which `make test` installs.

    python benchmarks/update.py --size small --device cpu --json update.json
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401
from lens_jax.models.parameters import select

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common, frame
from benchmarks.official import OfficialLayout
from lens_jax.aot import flops, shapes
from lens_jax.config import GRPOConfig, RunConfig
from lens_jax.data.images import window_layout
from lens_jax.flags import PositiveInt
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel, abstract, split_policy
from lens_jax.rewards.unified import Rewards
from lens_jax.rollout.sampler import Rollout
from lens_jax.training import grpo
from lens_jax.training.advantages import group_normalized
from lens_jax.training.state import apply, create, make_optimizer

SETTINGS = GRPOConfig(schedule="constant")
OPTIMIZER = make_optimizer(SETTINGS)
# Relative differences of losses and gradient norms between the sides.
TOLERANCE = {jnp.float32: 1e-3, jnp.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class UpdateOptions(frame.Options):
    completion: PositiveInt | None = None
    """Tokens of a completion; if not given, the size's, 40 at small."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """PyTorch's kernel."""


def given(earned: np.ndarray) -> Callable[..., Rewards]:
    """A reward that is known: `earned` [B, G]."""

    def reward(*_):
        x = jnp.asarray(earned)
        return Rewards(x[..., None], x, x, x, ("given",))

    return reward


def official_update(
    definition: nnx.GraphDef, absent: nnx.State, reward: Callable[..., Rewards]
) -> grpo.Update:
    """As `grpo.make_update`, in the official layout."""

    def update(state, frozen, reference, batch, rollout):
        group = rollout.lengths.shape[1]
        past = OfficialLayout(nnx.merge(definition, reference, absent), group)

        def loss(params):
            model = OfficialLayout(nnx.merge(definition, params, frozen), group)
            return grpo.sums(model, past, batch, rollout, reward, SETTINGS)

        sums = jax.grad(loss, has_aux=True)(state.params)
        gradients, metrics = jax.tree.map(lambda x: x / rollout.lengths.size, sums)
        state, norm = apply(state, gradients, metrics["loss"], OPTIMIZER)
        return state, metrics | {"grad_norm": norm}

    return update


def updates(
    config: LensConfig, dtype: Any, reward: Callable[..., Rewards], remat: str = "none"
) -> SimpleNamespace:
    """Both updates in JAX, and the model's shapes that they take."""
    model = _shapes_of_model(config, dtype, remat)
    definition, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    _, policy, rest = split_policy(model)
    return SimpleNamespace(
        ours=grpo.make_update(definition, rest, OPTIMIZER, reward, SETTINGS),
        official=official_update(definition, rest, reward),
        trained=trained,
        frozen=frozen,
        policy=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), policy),
    )


# Building it takes longer than tracing an update.
@functools.lru_cache(2)
def _shapes_of_model(config: LensConfig, dtype: Any, remat: str) -> LensModel:
    return abstract(config, dtype=dtype, remat=remat)


# ---- arithmetic ----------------------------------------------------------------------------------


def operations(
    size: common.Size, prompt: int, completion: int, grid: tuple[int, int]
) -> tuple[int, int]:
    """Floating-point operations of one group's update, ours and official; nothing is computed.

    Ours takes the image in windows, padded to whole rows; the official side its true patches.

    Args:
        grid: (rows, columns) of the image's patches.
    """
    config = size.config()
    vision = config.mllm.vision
    windows = window_layout(grid, vision.window_units, vision.merge_size)[0].shape
    patches = grid[0] * grid[1]
    # Patches cut evenly into rows of a window or less: what attention within windows costs is then
    # counted a little too low.
    row = max(n for n in range(1, vision.window_patches + 1) if patches % n == 0 and n % 4 == 0)
    program = updates(config, size.dtype, given(np.zeros((1, size.group), np.float32)))
    state = jax.eval_shape(partial(create, optimizer=OPTIMIZER), program.trained)

    def count(update: grpo.Update, slots: tuple[int, int]) -> int:
        batch, rollout = _shapes(config, size.group, prompt, completion, slots)
        return flops.count(update, state, program.frozen, program.policy, batch, rollout)

    return count(program.ours, windows), count(program.official, (patches // row, row))


def _shapes(
    config: LensConfig, group: int, prompt: int, completion: int, slots: tuple[int, int]
) -> tuple[Batch, Rollout]:
    batch = shapes.batch(config, 1, slots=slots, prompt=prompt, answer=1, canvas=(640, 640))
    tokens, lengths = (1, group, completion), (1, group)
    return batch, Rollout(
        tokens=shapes.array(tokens, jnp.int32),
        lengths=shapes.array(lengths, jnp.int32),
        log_probs=shapes.array(tokens, jnp.float32),
        ended=shapes.array(lengths, bool),
    )


# ---- time and memory -----------------------------------------------------------------------------


class JaxSide:
    """One of the updates in JAX, compiled, with its state; `step` is one update."""

    def __init__(self, update: grpo.Update, trained: nnx.State, *arguments: Any):
        self.state = create(trained, OPTIMIZER)
        self.arguments = arguments
        self.update = jax.jit(update, donate_argnums=0).lower(self.state, *arguments).compile()
        memory = self.update.memory_analysis()
        self.peak_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )

    def step(self) -> tuple[float, float]:
        """One update. Returns the loss and the gradient's norm, as numbers."""
        self.state, metrics = self.update(self.state, *self.arguments)
        return float(metrics["loss"]), float(metrics["grad_norm"])


def random_rollout(size: common.Size, completion: int) -> Rollout:
    """Completions of about this length, the longest of exactly it."""
    rng = np.random.default_rng(1)
    shape = (size.groups, size.group)
    lengths = completion - rng.integers(0, max(1, completion // 4), shape)
    lengths[0, 0] = completion
    tokens = (*shape, completion)
    return Rollout(
        tokens=rng.integers(0, 256, tokens).astype(np.int32),
        lengths=lengths.astype(np.int32),
        log_probs=np.zeros(tokens, np.float32),
        ended=np.ones(shape, bool),
    )


def measure(options: UpdateOptions) -> tuple[str, dict[str, frame.Comparison]]:
    """The title and rows of the table; all sides in turn in this process."""
    with frame.on_device(options) as size:
        completion = options.completion or size.completion
        title = (
            f"update, {size.groups} groups of {size.group}, prompt {size.prompt}, completion "
            f"{completion}, {frame.setting(options)}"
        )
        return title, compare(size, completion, options)


def compare(
    size: common.Size, completion: int, options: UpdateOptions
) -> dict[str, frame.Comparison]:
    from benchmarks.official_torch import OfficialUpdate

    inputs = common.random_inputs(size)
    rollout = random_rollout(size, completion)
    rng = np.random.default_rng(2)
    earned = rng.random(rollout.lengths.shape, np.float32)
    # As official checkpoints need it; the other scheme costs the same.
    model = common.random_model(size, context_positions="text", weights=jnp.float32)
    config, params = model.config, nnx.state(model)
    # Each side with what makes it fastest.
    program = updates(config, size.dtype, given(earned), RunConfig().remat)
    official = updates(config, size.dtype, given(earned)).official

    _, trained, frozen = nnx.split(model, select(GRPOConfig().trained), ...)
    _, policy, _ = split_policy(model)
    past = jax.tree.map(lambda x: 1.03 * x, policy)
    reference = jax.tree.map(lambda x: x.astype(size.dtype), past)
    batch = Batch(inputs.prompts, inputs.targets, np.arange(size.groups, dtype=np.int32))
    data = jax.device_put((frozen, reference, batch, rollout))

    ours = JaxSide(program.ours, trained, *data)
    theirs = JaxSide(official, trained, *data)
    memory = PeakMemory(options.device)
    in_torch = OfficialUpdate(
        size,
        config,
        params,
        past,
        inputs,
        rollout,
        np.array(group_normalized(jnp.asarray(earned))),
        SETTINGS,
        learning_rate=SETTINGS.learning_rate,
        max_grad_norm=SETTINGS.max_grad_norm,
        attention=options.attention,
        device=frame.PLATFORMS[options.device],
    )
    first = {"ours": ours.step(), "official, JAX": theirs.step()}
    with memory:
        first["official, PyTorch"] = in_torch.step()
    agree(first, TOLERANCE[size.dtype])

    sides = {"ours": ours.step, "JAX": theirs.step, "PyTorch": in_torch.step}
    seconds = frame.interleaved(sides, options.repeats)
    own = ours.peak_bytes / 2**20
    counted = [x / 1e9 for x in operations(size, size.prompt, completion, size.grid)]
    row = lambda a, b, unit: frame.Comparison(a, b, b / a, unit)  # noqa: E731
    return {
        "time, official layout in PyTorch": frame.faster(seconds["ours"], seconds["PyTorch"]),
        "time, official layout in JAX": frame.faster(seconds["ours"], seconds["JAX"]),
        "FLOPs a group, official layout in JAX": row(*counted, "GFLOP"),
        "peak memory, official layout in PyTorch": row(own, memory.peak_bytes / 2**20, "MiB"),
        "peak memory, official layout in JAX": row(own, theirs.peak_bytes / 2**20, "MiB"),
    }


class PeakMemory:
    """The most that PyTorch allocates while this is entered, counted from when it was made."""

    def __init__(self, device: frame.Device):
        self.on_gpu = device == "gpu"
        self.before = 0 if self.on_gpu else _resident("VmRSS")
        self.peak_bytes = 0

    def __enter__(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew

    def __exit__(self, *_: object) -> None:
        if self.on_gpu:
            import torch

            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self.peak_bytes = _resident("VmHWM") - self.before


def _resident(key: str) -> int:
    """Bytes of the process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def agree(first: dict[str, tuple[float, float]], tolerance: float) -> None:
    """Raises SystemExit unless losses and gradient norms of all sides are equal."""
    expected = first["ours"]
    for name, values in first.items():
        print(f"{name:18} loss {values[0]:.6f}, gradient norm {values[1]:.6f}")
        if not np.allclose(values, expected, rtol=tolerance, atol=0):
            frame.stop(f"{name} computes something else than ours")


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, UpdateOptions, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
