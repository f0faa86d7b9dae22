"""The gain of queries that go on from the rollout's caches (`context_positions: mrope`).

Both sides write the same greedy completions; then ours reads the queries on, and the other reads
image, prompt and completion once more, as every scheme but `mrope` has to.

    python benchmarks/queries.py --size small --device cpu --json queries.json
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lens_jax import interpreter  # noqa: F401

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common, frame
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensModel
from lens_jax.rollout.sampler import generate
from lens_jax.rollout.sampling import GREEDY

NO_END = (-1,)  # ends no completion
ROWS = 8  # images that launch/predict.py asks about together


def sides(
    model: LensModel, prompts: Prompts, tokens: int
) -> tuple[dict[str, Callable[[], jax.Array]], dict[str, Callable[[], jax.Array]]]:
    """Hidden states [B, 1, Q, D] of the queries: each side alone, and from the image on."""
    definition, state = nnx.split(model)
    prompts = jax.device_put(prompts)
    sample_id = jnp.arange(len(prompts.tokens))

    def write(state):
        model = nnx.merge(definition, state)
        embedded = model.embed(prompts)
        written, caches = generate(
            model,
            prompts,
            embedded,
            sample_id,
            jax.random.key(0),
            num_completions=1,
            max_new_tokens=tokens,
            end_tokens=NO_END,
            sampling=GREEDY,
        )
        return embedded, written.tokens, written.lengths, caches

    def go_on(state, embedded, completions, lengths, caches):
        model = nnx.merge(definition, state)
        return model.encode_queries(prompts, embedded, completions, lengths, caches)

    def read_again(state, embedded, completions, lengths, caches):
        model = nnx.merge(definition, state)
        return model.encode_queries(prompts, embedded, completions, lengths)

    reads = {"ours": jax.jit(go_on), "theirs": jax.jit(read_again)}
    whole = {
        name: jax.jit(lambda state, read=read: read(state, *write(state)))
        for name, read in reads.items()
    }
    written = jax.jit(write)(state)
    alone = {name: lambda read=read: read(state, *written) for name, read in reads.items()}
    return alone, {name: lambda run=run: run(state) for name, run in whole.items()}


def agree(ours: jax.Array, theirs: jax.Array, exact: bool) -> None:
    """Raises SystemExit unless both sides read the same."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"largest difference: {error:.1e} of the largest value")
    if exact and error > 1e-3:
        frame.stop("the sides read different things")


def measure(options: frame.Options) -> tuple[str, dict[str, frame.Comparison]]:
    rows = {}
    with frame.on_device(options) as size:
        model = common.random_model(size)
        prompts = common.random_inputs(size, rows=ROWS).prompts
        for tokens in (size.completion, size.reasoning):
            alone, whole = sides(model, prompts, tokens)
            values = (np.asarray(side(), np.float32) for side in alone.values())
            agree(*values, exact=size.dtype == jnp.float32)
            name = f"{ROWS} x {size.prompt} + {tokens}"
            for part, both in (("queries alone", alone), ("from the image on", whole)):
                rows[f"{name}, {part}"] = frame.compare(**both, repeats=options.repeats)
    return f"queries after a rollout, {frame.setting(options)}", rows


def main(argv: Sequence[str] | None = None) -> int:
    return frame.run(measure, frame.Options, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
