"""The processes of a run, one a host: how they find each other, and what they agree on.

What is called here by several processes is called by all of them, in the same order. With one
process every function answers at once.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lens_jax.config import ConfigError, DistributedConfig

# How long one process waits at the end of a run for the others, in seconds.
SHUTDOWN_TIMEOUT = 60

T = TypeVar("T")


class RemoteError(Exception):
    """Process 0 could not do something for all; the text is its own."""


def start(config: DistributedConfig) -> None:
    """Joins the processes of a run. Must come before anything that asks JAX for devices.

    Raises:
        ConfigError: they cannot be joined as configured.
    """
    given = (config.coordinator, config.processes, config.process_id)
    on_tpu = "tpu" in (jax.config.jax_platforms or "")
    if jax.distributed.is_initialized() or not (on_tpu or config.coordinator):
        return
    # A run listens to SIGTERM by itself, and its processes agree on the step to stop after.
    jax.config.update("jax_enable_preemption_service", False)
    # On CPUs, programs that run at once are suspected of mixing up their collectives in Gloo.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method="deactivate" if config.coordinator else None,
            initialization_timeout=config.join_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        if config.coordinator is None and jax.process_count() == 1:
            return  # a TPU machine that belongs to no cluster
        raise ConfigError(f"distributed: the processes cannot be joined: {error}") from error


def is_main() -> bool:
    """True in process 0, which writes the files that all processes share."""
    return jax.process_index() == 0


def leave(code: int) -> int:
    """The exit code of a process that ends early. One of several ends at once.

    The others may be waiting for it inside a program that will never end: they stop when its
    heartbeat does, and to take leave of them would only put that off.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def total(*values: int) -> list[int]:
    """The sum of each value over all processes."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.process_allgather(np.array(values, np.int32)).sum(0).tolist()


def gather(value: Any) -> list[Any]:
    """The values of all processes (anything that JSON holds), in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0].tolist()
    room = 1 << (max(sizes) - 1).bit_length()  # few sizes, few programs
    rows = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def by_main(function: Callable[[], T]) -> T:
    """Calls `function` in process 0 alone; all get its result (anything that JSON holds).

    Raises:
        RemoteError: in the other processes, where it raised in process 0.
    """
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    try:
        if is_main():
            answer = {"value": function()}
    except Exception as error:
        gather({"error": f"{error}"})
        raise
    answer = gather(answer)[0]
    if "error" in answer:
        raise RemoteError(answer["error"])
    return answer["value"]


def whole(x: Any) -> np.ndarray:
    """A global array on the host of every process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
