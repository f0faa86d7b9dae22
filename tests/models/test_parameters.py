"""The selector of parameters, and frozen ones of another type than those that train."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lens_jax.models.parameters import parameter_axes, select
from tests import micro

LENGTHS = np.array([[4], [6]], np.int32)


class Adapted(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.visual = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
        self.language = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)


def test_a_kind_of_one_part():
    _, chosen, rest = nnx.split(Adapted(nnx.Rngs(0)), select(("language",), nnx.LoRAParam), ...)
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(chosen)}
    assert names == {"language/lora/lora_a", "language/lora/lora_b"}
    assert len(jax.tree.leaves(rest)) == 6


def test_no_part_selects_nothing():
    assert not jax.tree.leaves(nnx.split(Adapted(nnx.Rngs(0)), select(()), ...)[1])


def test_stacks():
    names = (
        "language/layers/q_proj/kernel",
        "sam/image_encoder/trunk/blocks/0/mlp",
        "language/norm",
    )
    axes = parameter_axes(kv_heads=2)
    assert [axes.is_stacked(name) for name in names] == [True, False, False]
    assert [axes.is_scanned(name) for name in names] == [True, True, False]


def test_frozen_parameters_of_another_type():
    """Half of the bytes, nearly the same masks; gradients keep the type of what trains."""
    prompts = micro.collate(
        micro.CONFIG, [micro.row(micro.CONFIG, (4, 6), (3, 15), seed=i) for i in range(2)]
    )
    tokens = np.arange(12, dtype=np.int32).reshape(2, 1, 6)
    definition, trained, frozen = nnx.split(micro.model(), select(("context", "sam_decoder")), ...)

    @jax.jit
    def differentiate(trained, frozen):
        def loss(trained):
            model = nnx.merge(definition, trained, frozen)
            hidden = model.encode_queries(prompts, model.embed(prompts), tokens, LENGTHS)
            masks = model.decode_masks(model.sam_features(prompts), hidden, stability=False)
            return (masks.logits**2).mean()

        return jax.value_and_grad(loss)(trained)

    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    (exact, _), (near, gradients) = differentiate(trained, frozen), differentiate(trained, half)
    assert abs(near - exact) < 0.05 * exact
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
