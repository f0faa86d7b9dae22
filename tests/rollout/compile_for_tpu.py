"""Compiles the rollout of the 3B model for a v5e without one; writes the scheduled HLO.

    python -m tests.rollout.compile_for_tpu FILE

A process of its own, with ENVIRONMENT, because libtpu takes over signals.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.common import SIZES
from lens_jax import sharding
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import abstract, split_policy
from lens_jax.rollout.sampler import rollout
from lens_jax.rollout.sampling import Sampling

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PROMPTS = 8  # on each chip
SIZE = SIZES["3b"]


def main(file: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = jax.make_mesh((4, 1, 1), sharding.AXES, devices=topology.devices)
    size = SIZE
    definition, policy, rest = split_policy(abstract(size.config(), dtype=size.dtype))

    # As the stage runs it: each device samples its own prompts and stops when they have ended.
    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), sharding.BATCH, sharding.BATCH, sharding.BATCH, P(), P()),
        out_specs=sharding.BATCH,
        check_vma=False,
    )
    def write(policy, prompts, embedded, sample_id, key, temperature):
        return rollout(
            nnx.merge(definition, policy, rest),
            prompts,
            embedded,
            sample_id,
            jax.random.wrap_key_data(key),
            num_completions=size.group,
            max_new_tokens=size.reasoning,
            end_tokens=(151645, 151643),
            sampling=Sampling(temperature, top_k=50, top_p=0.95),
        )

    def array(shape, dtype, spec=sharding.BATCH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    b, p = PROMPTS * mesh.size, size.prompt
    blank = array((b, 1), jnp.int32)  # the rollout reads no pictures
    prompts = Prompts(
        patches=blank,
        patch_positions=blank,
        patch_mask=blank,
        tokens=array((b, p), jnp.int32),
        image_index=blank,
        length=array((b,), jnp.int32),
        positions=array((b, 3, p), jnp.int32),
        next_position=array((b,), jnp.int32),
        sam_pixels=blank,
    )
    program = write.lower(
        jax.tree.map(lambda x: array(x.shape, size.dtype, P()), policy),
        prompts,
        array((b, p, size.config().mllm.hidden_size), size.dtype),
        array((b,), jnp.int32),
        array((2,), jnp.uint32, P()),
        array((), jnp.float32, P()),
    )
    Path(file).write_text(program.compile().as_text())


if __name__ == "__main__":
    main(sys.argv[1])
