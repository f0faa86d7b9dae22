"""Checks of values that are well-typed but do not go together."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lens_jax.config.keys import leaves
from lens_jax.config.sections import (
    MOST_STEPS,
    ConfigError,
    DataConfig,
    DistributedConfig,
    RewardsConfig,
    RunConfig,
    StageConfig,
)


def validate(config: RunConfig) -> None:
    """Raises ConfigError for values that are well-typed but do not go together."""
    if config.model.checkpoint is None and not (config.model.mllm and config.model.sam):
        raise ConfigError(
            "no start weights: give model.checkpoint, or model.mllm and model.sam to convert"
        )
    if config.run_dir == "":
        raise ConfigError("run_dir: give a folder, or leave it out: runs/<name of the config file>")
    if "://" in (config.run_dir or ""):
        raise ConfigError(
            f"run_dir {config.run_dir}: a run needs a directory of a file system that all hosts "
            "see; its checkpoints alone may lie in a bucket: checkpoint.directory"
        )
    _validate_numbers(config)
    _validate_data(config.data)
    if config.data.data_dir is None and not config.data.generated:
        raise ConfigError(
            "no data: give data.data_dir, or, to generate refcoco, data.shapes.train_scenes"
        )
    for name in ("alignment", "grpo"):
        stage: StageConfig = getattr(config, name)
        if stage.steps and not stage.trained:
            raise ConfigError(f"{name}.trained is empty: name a part, or set {name}.steps to 0")
    if config.grpo.steps:
        _validate_grpo(config)
    for key in ("windows", "prompt_tokens", "answer_tokens", "canvas"):
        if not getattr(config.data, key):
            raise ConfigError(f"data.{key} is empty: give at least one bucket")
    _validate_distributed(config.distributed)


def _validate_numbers(config: RunConfig) -> None:
    """Numbers that no run can have: NaN and infinity, and whole numbers too large to count with."""
    for key, value in leaves(config).items():
        last = key.split(".")[-1]
        most = {"seed": 2**32 - 1, "steps": MOST_STEPS}.get(last, 2**31 - 1)
        for number in np.ravel(np.array(value, object)):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{key}: expected a finite number, got {number}")
            if isinstance(number, int) and number > most:
                raise ConfigError(f"{key}: expected a number of at most {most}, got {number}")


def _validate_data(data: DataConfig) -> None:
    if data.mixture_weights and len(data.mixture_weights) != len(data.mixture):
        raise ConfigError(
            f"data.mixture_weights names {len(data.mixture_weights)} weights for "
            f"{len(data.mixture)} data sets of data.mixture: give one for each"
        )
    if len(set(data.mixture)) != len(data.mixture):
        raise ConfigError("data.mixture names a data set twice: raise its weight instead")
    if data.mixture and data.dataset not in data.mixture:
        raise ConfigError(
            f"data.dataset {data.dataset} is not in data.mixture {', '.join(data.mixture)}: a run "
            "trains on the mixture and evaluates on dataset; --data.mixture '[]' trains on "
            f"{data.dataset} alone"
        )
    for dataset in data.mixture or (data.dataset,):
        if data.curriculum and not dataset.startswith("ref"):
            raise ConfigError(f"data.curriculum: {dataset} has no refs, only RefCOCO's sets do")


def _validate_distributed(distributed: DistributedConfig) -> None:
    keys = ("coordinator", "processes", "process_id")
    values = {f"distributed.{key}": getattr(distributed, key) for key in keys}
    missing = [key for key, value in values.items() if value is None]
    if len(missing) in (1, 2):
        raise ConfigError(f"{' and '.join(missing)} missing: the three go together {list(values)}")
    if missing:
        return
    host, _, port = distributed.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"distributed.coordinator {distributed.coordinator}: expected HOST:PORT")
    if distributed.process_id >= distributed.processes:
        raise ConfigError(
            f"distributed.process_id {distributed.process_id} is none of "
            f"{distributed.processes} processes: they count from 0"
        )


def _validate_grpo(config: RunConfig) -> None:
    grpo, rollout, rewards = config.grpo, config.rollout, config.rewards
    if grpo.num_generations < 2:
        raise ConfigError(
            "grpo.num_generations is 1: a group of one has no advantage, give 2 or more"
        )
    if not (grpo.policy_weight or grpo.segmentation_weight):
        raise ConfigError(
            "grpo.policy_weight and grpo.segmentation_weight are 0: no loss is left, "
            "set grpo.steps to 0 to skip the stage"
        )
    if grpo.detach_segmentation and not grpo.segmentation_weight:
        raise ConfigError("grpo.detach_segmentation needs grpo.segmentation_weight above 0")
    _validate_custom(rewards)
    if not grpo.policy_weight:
        if grpo.entropy_weight:
            raise ConfigError("grpo.entropy_weight needs grpo.policy_weight above 0")
        return
    if not {"visual", "language"} & set(grpo.trained):
        raise ConfigError(
            "grpo.trained names neither visual nor language, so that the policy loss trains "
            "nothing: add one, or set grpo.policy_weight to 0"
        )
    weights = (rewards.format, rewards.box, rewards.segment, rewards.boundary)
    if not any((*weights, *rewards.custom_weights)):
        raise ConfigError("all weights of rewards are 0: nothing to learn, raise one above 0")
    for key, greedy in (("top_k", rollout.top_k == 1), ("top_p", rollout.top_p == 0)):
        if greedy:
            raise ConfigError(
                f"rollout.{key} {getattr(rollout, key)} is greedy: a group of equal completions "
                f"has no advantage, raise rollout.{key}"
            )


def _validate_custom(rewards: RewardsConfig) -> None:
    if len(rewards.custom) != len(rewards.custom_weights):
        raise ConfigError(
            f"rewards.custom names {len(rewards.custom)} channels and rewards.custom_weights has "
            f"{len(rewards.custom_weights)} weights: give one for each"
        )
    names = [path.partition(":")[2] for path in rewards.custom]
    known = {"format", "box", "segment", "boundary"}
    if taken := [name for name in names if name in known or names.count(name) > 1]:
        raise ConfigError(f"rewards.custom: there are two channels {taken[0]}, rename the function")
    for path in rewards.custom:
        import_function(path)


def import_function(path: str) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names. Raises ConfigError."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's, and is run here
        raise ConfigError(
            f"rewards.custom: {path} cannot be imported ({type(error).__name__}: "
            f"{' '.join(str(error).split())});"
            " expected MODULE:FUNCTION, with the module's folder on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ConfigError(f"rewards.custom: {path} is no function")
    if (called := getattr(function, "__name__", "without a name")) != name:
        raise ConfigError(
            f"rewards.custom: {path} is a function called {called}, and its channel is named by "
            f"that: write it as def {name}(answers)"
        )
    return function


def batch_rows(config: RunConfig) -> int:
    """The largest number that divides the batches of every stage that runs; 0 if none does."""
    stages = (config.alignment, config.grpo)
    return math.gcd(*(stage.batch_size for stage in stages if stage.steps))


def check_batches(config: RunConfig, data: int, fsdp: int) -> None:
    """Raises ConfigError when a batch does not divide over the mesh axes `data` x `fsdp`."""
    sizes = {
        f"{name}.batch_size": getattr(config, name).batch_size
        for name in ("alignment", "grpo")
        if getattr(config, name).steps
    }
    for name, size in sizes.items():
        if size % (data * fsdp):
            raise ConfigError(
                f"{name} {size} does not divide over mesh.data {data} x mesh.fsdp {fsdp} = "
                f"{data * fsdp} parts"
            )
