"""One process of several: an update of stage 2, sampled completions, a checkpoint.

`python -m tests.training.worker FOLDER PROCESSES PROCESS_ID COORDINATOR [resume]`
"""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from lens_jax import checkpoints
from lens_jax.config import DistributedConfig, MeshConfig
from lens_jax.distribution import processes, sharding
from tests.training import stages

# All four devices of however many processes; every parameter is cut.
MESH = MeshConfig(data=2, fsdp=2)


def work(folder: Path, resume: bool) -> dict[str, np.ndarray]:
    """Everything that must not depend on the number of processes; by name."""
    mesh = sharding.make_mesh(MESH, jax.devices()[:4])
    sharding.parameter_spec.__kwdefaults__["min_elements"] = 0
    program = stages.Program("grpo", mesh)
    store = checkpoints.TrainingCheckpoints(folder / "checkpoints", keep=2)
    position = 0
    if resume:
        saved = store.restore(store.latest(), {"state": program.state, "position": 0})
        program.state, position = saved["state"], saved["position"]
    meet(program)
    results = step(program) | {"position": np.array(position)}
    if not resume:
        store.save(1, {"state": program.state, "position": stages.B})
        store.wait()
        results |= {f"next/{name}": value for name, value in step(program).items()}
    tokens = stages.sample(mesh)
    results |= {f"sampled/{key}": processes.whole(x) for key, x in vars(tokens).items()}
    return results


def meet(program: stages.Program) -> None:
    """Compiles the update and waits for the others, who may be slower.

    Gloo gives processes 30 s to meet inside of a program.
    """
    update = program.stage.update.lower(program.state, *program.arguments).compile()
    program.stage = dataclasses.replace(program.stage, update=update)
    client = jax._src.distributed.global_state.client
    if client is not None:
        client.wait_at_barrier("compiled", 600_000)


def step(program: stages.Program) -> dict[str, np.ndarray]:
    """Metrics of an update, and the state after it, by name."""
    results = {f"metrics/{name}": value for name, value in program.step().items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.state):
        results[f"state{jax.tree_util.keystr(path)}"] = processes.whole(leaf)
    return results


def main(folder: str, count: str, process_id: str, coordinator: str, *resume: str) -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    # With programs of earlier runs, Gloo now and then received another collective's bytes.
    jax.config.update("jax_enable_compilation_cache", False)
    patient = {"heartbeat_timeout": 300}  # compiling on a busy machine starves heartbeats
    processes.start(DistributedConfig(coordinator, int(count), int(process_id), **patient))
    results = work(Path(folder), bool(resume))
    np.savez(Path(folder) / f"{count}.{process_id}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
