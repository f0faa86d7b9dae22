"""How arrays lie on devices and move between them.

**Mesh.** `sharding.make_mesh` puts all devices of a run on three axes: `data` holds copies of the
model, `fsdp` cuts parameters and moments, `tensor` cuts heads, MLPs and vocabulary. The rows of a
batch lie over `data` and `fsdp` together, so each of these parts computes its own rows.

**Processes.** One a host. They start, gather small values and agree in `processes`. Each reads the
rows that its devices hold (`sharding.share`, a `rows.Share`); `sharding.global_batch` makes one
array of them, and `own_rows` takes them back.

**Parameters.** A model names the logical axes of its parameters' last dimensions, `embed`, `heads`,
`mlp` and so on (`axes.ParameterAxes`), and `sharding.LOGICAL` says which axis of the mesh cuts
each: `fsdp` cuts `embed`, `tensor` the others. Small parameters, and axes that do not divide, stay
whole. Moments lie as their parameters do, so an optimizer step moves nothing. There are two
layouts:

- *training*, `sharding.shardings`: cut over `fsdp` and `tensor`, one part a device;
- *sampling*, `sharding.sampling_shardings`: cut over `tensor` alone, and whole on every part of
  `data` and `fsdp`, for decoding reads all weights at every token. Before a rollout the policy is
  resharded from the first layout to the second, layer by layer and in the precision of products.

**Gradients.** `gradients.differentiate` runs forward and backward on every device for its own rows,
inside `jax.shard_map` over `data` and `fsdp`; the compiler places the collectives of `tensor`. A
device holds a part of each large parameter, and a layer needs the whole one. Parameters that no
scan runs are gathered at the start. Those of layers travel as they are, in parts, within the
`nnx.State` into the forward pass, and `models.layers.scan` gathers a layer's just before it runs:
never is more than a layer whole. The backward pass gathers it again. The transpose of a gather
sums a gradient over devices and scatters it, so each device ends with the gradient of its part.

The obvious way, whole parameters with sharding constraints, leaves the choice to the compiler. It
then cuts the vision tower's activations over all devices and moves those: 1,000 GB a chip for one
update of LENS-3B on v5e:4x4, where gathered weights take 159 GB (docs/tpu.md).
"""
