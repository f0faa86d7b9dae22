"""Stage 1's metrics, with a model that draws what it is told to."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from lens_jax.models.inputs import Batch, Targets
from lens_jax.training import alignment

SIZE = (8, 8)


class Drawing:
    """A model whose masks are given."""

    def __init__(self, logits):
        self.logits = logits

    def embed(self, prompts):
        return None

    def encode_queries(self, prompts, embedded, answer, length):
        return None

    def sam_features(self, prompts):
        return None

    def decode_masks(self, features, hidden, *, stability):
        return SimpleNamespace(logits=self.logits)


def test_the_mask_iou_of_samples_without_target():
    """1 for an empty mask, 0 for any other; as in stage 2, a box makes a target."""
    mask = np.zeros((4, *SIZE), bool)
    mask[3, :4] = True
    box = np.zeros((4, 4), np.float32)
    box[2] = 1, 1, 2, 2
    drawn = np.full((4, 1, *SIZE), -5, np.float32)
    drawn[1, 0, 0, 0] = drawn[3, 0, :2] = 5
    ones = np.ones(4, np.int32)
    targets = Targets(box, mask, np.array([SIZE] * 4), ones[:, None], ones)
    single = (slice(i, i + 1) for i in range(4))
    ious = [
        float(
            alignment.sums(
                Drawing(jnp.asarray(drawn[i])),
                Batch(None, Targets(*(x[i] for x in vars(targets).values())), ones[i]),
            )[1]["mask_iou"]
        )
        for i in single
    ]
    np.testing.assert_allclose(ious, [1, 0, 0, 0.5], atol=1e-5)
