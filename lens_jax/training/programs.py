"""The compiled programs of a run, with the shardings they run under.

`training.stages` calls them; launch/compile.py compiles the same ones for slices that are not
there. So the model is one of shapes, and nothing is computed here.
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lens_jax.config import ConfigError, RunConfig, StageConfig, import_function
from lens_jax.distribution import sharding
from lens_jax.distribution.axes import ParameterAxes, name_of
from lens_jax.distribution.gradients import Layout
from lens_jax.models.inputs import Batch
from lens_jax.models.lens import LensConfig, LensModel, abstract, split_policy
from lens_jax.models.long_attention import Attention
from lens_jax.models.parameters import select
from lens_jax.models.precision import DTYPES, products
from lens_jax.rewards.sentence import TextScorer
from lens_jax.rewards.unified import UnifiedReward, check_channel
from lens_jax.rollout.sampler import Rollout, rollout
from lens_jax.rollout.sampling import Sampling
from lens_jax.training import alignment, grpo
from lens_jax.training.state import TrainState, create, make_optimizer, make_schedule


def precision(config: RunConfig) -> AbstractContextManager:
    """Context in which a run traces its programs: the precision of matrix products."""
    return products(config.precision)


def abstract_model(config: RunConfig, shapes: LensConfig, mesh: Mesh) -> LensModel:
    """The model's shapes, with the precision, kernels and memory policy that a run asks for.

    Raises:
        ConfigError: the kernel that `attention` names does not run on the mesh.
    """
    dtype = DTYPES[config.precision]
    try:
        attention = Attention.choose(
            config.attention, mesh, dtype=dtype, head_dims=shapes.head_dims
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return abstract(shapes, dtype=dtype, remat=config.remat, attention=attention)


def check_rewards(config: RunConfig) -> None:
    """Raises ConfigError for a channel of one's own that an update could not use."""
    if not config.grpo.steps:
        return
    for path in config.rewards.custom:
        try:
            check_channel(
                import_function(path),
                generations=config.grpo.num_generations,
                tokens=config.rollout.max_new_tokens,
                canvas=config.data.canvas[0],
            )
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"rewards.custom: {path} cannot be computed: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Stage:
    """Common to both stages: shapes of trained and frozen parameters, and the first state."""

    definition: nnx.GraphDef
    parts: Sequence[str]
    """Parts of the model that train."""
    trained: nnx.State
    frozen: nnx.State
    schedule: optax.Schedule
    create: Callable[[nnx.State], TrainState]
    """The first state, from the trained parameters, which are donated."""

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """All parameters of a model in two: trained, and frozen."""
        return nnx.split(nnx.merge(self.definition, params), select(self.parts), ...)[1:]


@dataclasses.dataclass(frozen=True)
class Alignment(Stage):
    """Stage 1."""

    update: alignment.Update
    """`(state, frozen, batch) -> (state, metrics)`; the state is donated."""


@dataclasses.dataclass(frozen=True)
class Reinforcement(Stage):
    """Stage 2."""

    temperatures: np.ndarray
    """Temperature of each step's rollout, float32 [steps]."""
    needs_reference: bool
    cast: Callable[[nnx.State], nnx.State]
    """The policy in the precision of matrix products: the reference."""
    reshard: Callable[[nnx.State], nnx.State]
    """The policy in the layout of sampling and the precision of matrix products."""
    sample: Callable[[nnx.State, Batch, jax.Array], Rollout]
    """`(policy, batch, step)`: completions."""
    completion_tokens: tuple[int, ...]
    """Buckets of the completions that an update reads, ascending; the last is the limit."""
    trim: Callable[[Rollout, int], Rollout]
    """Cuts completions to one of these lengths; it is compiled for each."""
    update: grpo.Update
    """`(state, frozen, reference, batch, rollout) -> (state, metrics)`; the state is donated."""

    def policy(self, trained: nnx.State, frozen: nnx.State) -> nnx.State:
        """The part of the model that reads and generates text."""
        return split_policy(nnx.merge(self.definition, trained, frozen))[1]


def build_alignment(config: RunConfig, mesh: Mesh, model: LensModel) -> Alignment:
    """The programs of stage 1."""
    settings = config.alignment
    stage, optimizer, state_shardings, gradients = _stage(config, settings, mesh, model)
    update = alignment.make_update(
        stage["definition"], optimizer, **gradients, stability=settings.stability
    )
    update = jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, None))
    return Alignment(**stage, update=update)


def build_reinforcement(
    config: RunConfig,
    mesh: Mesh,
    model: LensModel,
    *,
    read_text: TextScorer,
    end_tokens: Sequence[int],
) -> Reinforcement:
    """The programs of stage 2.

    Args:
        read_text: `text_rewards` of the tokenizer.
        end_tokens: each ends a completion.
    """
    settings, sampling = config.grpo, config.rollout
    definition, policy, rest = split_policy(model)
    shapes_of_rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rest)
    axes, dtype = model.config.axes, DTYPES[config.precision]

    def cast(policy: nnx.State) -> nnx.State:
        return jax.tree.map(lambda x: x.astype(dtype), policy)

    stage, optimizer, state_shardings, gradients = _stage(config, settings, mesh, model)
    custom = tuple(import_function(path) for path in config.rewards.custom)
    reward = UnifiedReward(read_text, config.rewards, custom)
    update = grpo.make_update(
        stage["definition"], shapes_of_rest, optimizer, reward, settings, **gradients
    )
    temperatures = np.linspace(
        sampling.temperature, sampling.final_temperature or sampling.temperature, settings.steps
    ).astype(np.float32)
    # Each part of the mesh samples its own prompts and stops when they have ended. Only where
    # `tensor` cuts the policy does the compiler place collectives, and then all stop together.
    alone = mesh.shape["tensor"] == 1
    manual = sharding.AXES if alone else sharding.BATCH[0]

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), sharding.BATCH, P()),
        out_specs=sharding.BATCH,
        axis_names=set(manual),
        check_vma=False,
    )
    def sample(policy, batch: Batch, index):
        model = nnx.merge(definition, policy, shapes_of_rest)
        return rollout(
            model,
            batch.prompts,
            model.embed(batch.prompts),
            batch.sample_id,
            jax.random.fold_in(jax.random.key(config.seed), index),
            num_completions=settings.num_generations,
            max_new_tokens=sampling.max_new_tokens,
            end_tokens=end_tokens,
            sampling=Sampling(jnp.asarray(temperatures)[index], sampling.top_k, sampling.top_p),
            together=() if alone else manual,
        )

    limit = sampling.max_new_tokens
    buckets = {n for n in sampling.completion_tokens if n < limit} | {limit}

    @partial(jax.jit, static_argnums=1)
    def trim(rollout: Rollout, length: int) -> Rollout:
        return rollout.replace(
            tokens=rollout.tokens[..., :length], log_probs=rollout.log_probs[..., :length]
        )

    return Reinforcement(
        **stage,
        temperatures=temperatures,
        needs_reference=bool(settings.beta and settings.policy_weight),
        cast=jax.jit(cast, out_shardings=sharding.shardings(policy, mesh, axes)),
        reshard=make_reshard(config, mesh, policy, axes),
        sample=sample,
        completion_tokens=tuple(sorted(buckets)),
        trim=trim,
        update=jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, None)),
    )


def make_reshard(
    config: RunConfig, mesh: Mesh, params: nnx.State, axes: ParameterAxes
) -> Callable[[nnx.State], nnx.State]:
    """Makes the function that reshards parameters from training to sampling.

    It casts to the precision of matrix products and goes layer by layer: a whole stack would lie
    there twice, as it was gathered and in order.
    """
    dtype = DTYPES[config.precision]
    shardings = sharding.sampling_shardings(params, mesh, axes)

    def of(path, x, target):
        if not axes.is_stacked(name_of(path)):
            return x.astype(dtype)
        layer = NamedSharding(mesh, P(*target.spec[1:]))
        return jax.lax.map(lambda x: jax.lax.with_sharding_constraint(x.astype(dtype), layer), x)

    return jax.jit(
        lambda params: jax.tree_util.tree_map_with_path(of, params, shardings),
        out_shardings=shardings,
    )


def _stage(
    config: RunConfig, settings: StageConfig, mesh: Mesh, model: LensModel
) -> tuple[dict[str, Any], optax.GradientTransformation, TrainState, dict[str, Any]]:
    """The members of a `Stage`, its optimizer, the sharding of each array of its state, and how an
    update computes gradients.

    Moments lie with their parameters. Updates must be told: left alone, the compiler may lay out
    the new state otherwise, which copies what was donated and compiles the second step again.
    """
    axes = model.config.axes
    definition, trained, frozen = nnx.split(model, select(settings.trained), ...)
    optimizer = make_optimizer(settings)
    start = partial(create, optimizer=optimizer)
    state_shardings = sharding.shardings(jax.eval_shape(start, trained), mesh, axes)
    stage = dict(
        definition=definition,
        parts=settings.trained,
        trained=trained,
        frozen=frozen,
        schedule=make_schedule(settings),
        create=jax.jit(start, donate_argnums=0, out_shardings=state_shardings),
    )
    gradients = dict(
        micro_batches=settings.micro_batches(sharding.num_parts(mesh)),
        layout=Layout(mesh, DTYPES[config.precision], axes),
    )
    return stage, optimizer, state_shardings, gradients
