"""lens_jax.Lens, as scripts call it."""

import jax
import numpy as np
import pytest

from lens_jax import Lens, sharding
from lens_jax.config import MeshConfig
from lens_jax.data.sources import open_source

SENTENCES = ("the red circle", "the square on the left", "it")


@pytest.fixture(scope="module")
def lens(checkpoint):
    return Lens.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def image(data_dir):
    return open_source("refcoco", "val", data_dir, evaluation=True)[0].image


@pytest.fixture(scope="module")
def results(lens, image):
    return lens.segment_batch([image] * 3, SENTENCES)


def test_what_a_completion_prompts_sam_with(lens, image, results):
    """The same for tokens as for their text; and the mask is the one that `segment` draws."""
    tokens = lens.processor.encoder.encode(results[0].completion)
    given = lens.mask_logits(image, SENTENCES[0], results[0].completion)
    np.testing.assert_array_equal(given, lens.mask_logits(image, SENTENCES[0], tokens))
    embedding = lens.context_embedding(image, SENTENCES[0], tokens)
    assert embedding.ndim == 1
    np.testing.assert_array_equal(
        embedding, lens.context_embedding(image, SENTENCES[0], results[0].completion)
    )
    other = lens.context_embedding(image, SENTENCES[0], tokens, reasoning=True)
    assert not np.allclose(embedding, other)


def test_a_given_completion_draws_what_it_drew_when_it_was_written(lens, image):
    inputs = lens._prompts([image], SENTENCES[:1], False)
    written = lens.respond(inputs, np.zeros(1, np.int32))
    tokens = written.tokens[0, : written.lengths[0]]
    given = lens.mask_logits(image, SENTENCES[0], tokens)
    np.testing.assert_allclose(given, written.mask_logits[0], rtol=1e-4, atol=1e-4)


def test_devices_share_pictures_that_do_not_divide(checkpoint, image, results):
    """One picture, or three, on two devices, as on one; none is no mistake."""
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    lens = Lens.from_pretrained(checkpoint, mesh=mesh)
    shared = lens.segment_batch([image] * 3, SENTENCES)
    assert len(shared) == 3
    for ours, alone in zip(
        [lens.segment(image, "it"), *shared], [results[2], *results], strict=True
    ):
        assert ours.completion == alone.completion
        np.testing.assert_allclose(ours.mask_logits, alone.mask_logits, rtol=1e-4, atol=1e-4)
    assert lens.segment_batch([], []) == []
    with pytest.raises(ValueError):
        lens.segment_batch([image], [])


def test_drawn_completions_depend_on_the_seed(lens, image):
    first, again, other = (
        lens.segment(image, "it", temperature=2.0, seed=seed).completion for seed in (1, 1, 2)
    )
    assert first == again != other
