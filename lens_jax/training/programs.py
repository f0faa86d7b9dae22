"""The compiled programs of a run, with the shardings they run under.

The loop calls them; launch/compile.py compiles the same ones for slices that are not there. So
models come as arrays or as shapes, and nothing is computed here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lens_jax import sharding
from lens_jax.config import ConfigError, GRPOConfig, RunConfig, StageConfig
from lens_jax.models.attention import Attention
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel, abstract, split_policy
from lens_jax.rewards.sentence import Score
from lens_jax.rewards.unified import UnifiedReward
from lens_jax.rollout.sampler import Rollout, rollout
from lens_jax.rollout.sampling import Sampling
from lens_jax.training import alignment, grpo
from lens_jax.training.state import TrainState, among, create, make_optimizer, make_schedule, split


def precision(config: RunConfig) -> AbstractContextManager:
    """Under which a run's programs are traced."""
    return jax.default_matmul_precision("highest" if config.precision == "float32" else "default")


def abstract_model(config: RunConfig, shapes: LensConfig, mesh: Mesh) -> LensModel:
    """The model's shapes, with the precision, kernels and memory policy that a run asks for.

    Raises:
        ConfigError: the kernel that `attention` names does not run on the mesh.
    """
    dtype = _dtype(config)
    try:
        attention = Attention.choose(
            config.attention, mesh, dtype=dtype, head_dims=shapes.head_dims
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return abstract(shapes, dtype=dtype, remat=config.remat, attention=attention)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What both stages have: the model in two, and where a training state comes from."""

    definition: nnx.GraphDef
    trained: nnx.State
    frozen: nnx.State
    schedule: optax.Schedule
    create: Callable[[nnx.State], TrainState]
    """The first state, from `trained`."""


@dataclasses.dataclass(frozen=True)
class Alignment(Stage):
    """Stage 1."""

    update: alignment.Update
    """`(state, frozen, batch) -> (state, metrics)`; the state is donated."""


@dataclasses.dataclass(frozen=True)
class Reinforcement(Stage):
    """Stage 2."""

    temperatures: np.ndarray
    """Of each step's rollout, float32 [steps]."""
    policy: nnx.State
    """The part of the model that reads and writes text, as the stage finds it."""
    needs_reference: bool
    lighten: Callable[[nnx.State], nnx.State]
    """The policy in the precision of matrix products: the reference."""
    relayout: Callable[[nnx.State], nnx.State]
    """The same from the layout of training to that of sampling."""
    write: Callable[[nnx.State, Batch, jax.Array], Rollout]
    """`(policy, batch, step)`: completions."""
    update: grpo.Update
    """`(state, frozen, reference, batch, rollout) -> (state, metrics)`; the state is donated."""

    def policy_of(self, state: TrainState) -> nnx.State:
        """`policy`, with a state's parameters."""
        return split_policy(nnx.merge(self.definition, state.params, self.frozen))[1]


def build_alignment(config: RunConfig, mesh: Mesh, model: LensModel) -> Alignment:
    """The programs of stage 1."""
    settings = config.alignment
    parts, optimizer, places = _stage(settings, mesh, model)
    update = alignment.make_update(
        parts["definition"], optimizer, settings.accumulation_steps, stability=settings.stability
    )
    update = jax.jit(update, donate_argnums=0, out_shardings=(places, None))
    return Alignment(**parts, update=update)


def build_reinforcement(
    config: RunConfig,
    mesh: Mesh,
    model: LensModel,
    *,
    read_text: Score,
    end_tokens: Sequence[int],
) -> Reinforcement:
    """The programs of stage 2.

    Args:
        read_text: `text_rewards` of the tokenizer.
        end_tokens: each ends a completion.
    """
    settings, sample = config.grpo, config.rollout
    _, policy, rest = split_policy(model)
    shapes_of_rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    dtype = _dtype(config)

    def lighten(policy: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x: x.astype(dtype), policy)

    parts, optimizer, places = _stage(settings, mesh, model)
    reward = UnifiedReward(sharding.by_rows(read_text, mesh), **dataclasses.asdict(config.rewards))
    update = grpo.make_update(
        parts["definition"],
        shapes_of_rest,
        optimizer,
        reward,
        _objective(settings),
        settings.accumulation_steps,
    )
    temperatures = np.linspace(
        sample.temperature, sample.final_temperature or sample.temperature, settings.steps
    ).astype(np.float32)
    definition = nnx.split(model)[0]

    # Each device samples its own prompts and stops when they have ended.
    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), sharding.BATCH, P()),
        out_specs=sharding.BATCH,
        check_vma=False,
    )
    def write(policy, batch: Batch, index):
        model = nnx.merge(definition, policy, shapes_of_rest)
        return rollout(
            model,
            batch.prompts,
            model.embed(batch.prompts),
            batch.sample_id,
            jax.random.fold_in(jax.random.key(config.seed), index),
            num_completions=settings.num_generations,
            max_new_tokens=sample.max_new_tokens,
            end_tokens=end_tokens,
            sampling=Sampling(jnp.asarray(temperatures)[index], sample.top_k, sample.top_p),
        )

    return Reinforcement(
        **parts,
        temperatures=temperatures,
        policy=policy,
        needs_reference=bool(settings.beta and settings.policy_weight),
        lighten=jax.jit(lighten),
        # Light, and whole on every device.
        relayout=jax.jit(lighten, out_shardings=sharding.replicated(mesh)),
        write=write,
        update=jax.jit(update, donate_argnums=0, out_shardings=(places, None)),
    )


def _stage(
    settings: StageConfig, mesh: Mesh, model: LensModel
) -> tuple[dict[str, Any], optax.GradientTransformation, TrainState]:
    """The members of a `Stage`, its optimizer, and where each array of its state lies.

    Moments lie with their parameters. Updates must be told: left alone, the compiler may lay out
    the new state otherwise, which copies what was donated and compiles the second step again.
    """
    definition, trained, frozen = split(model, among(settings.trained))
    schedule = make_schedule(
        settings.schedule, settings.learning_rate, settings.warmup_steps, settings.steps
    )
    optimizer = make_optimizer(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    start = partial(create, optimizer=optimizer)
    shapes = jax.eval_shape(start, trained)
    places = sharding.shardings(shapes, mesh, kv_heads=model.config.mllm.num_kv_heads)
    parts = dict(
        definition=definition,
        trained=trained,
        frozen=frozen,
        schedule=schedule,
        create=jax.jit(start, out_shardings=places),
    )
    return parts, optimizer, places


def _objective(settings: GRPOConfig) -> grpo.Objective:
    names = [field.name for field in dataclasses.fields(grpo.Objective)]
    return grpo.Objective(**{name: getattr(settings, name) for name in names})


def _dtype(config: RunConfig):
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[config.precision]
