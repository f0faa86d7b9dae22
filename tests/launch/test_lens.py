"""lens_jax.Lens, as scripts call it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lens_jax import Lens
from lens_jax.config import MeshConfig
from lens_jax.data.sources import open_source
from lens_jax.distribution import sharding
from lens_jax.inference import programs
from lens_jax.inference.inputs import prepare
from lens_jax.rollout.sampler import Rollout

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


@pytest.mark.parametrize(
    "completion", [[448000], [-1], [1.5], [[1, 2]], [[1], [1, 2]], None, "x" * 20000]
)
def test_what_is_no_completion_is_refused(lens, image, completion):
    with pytest.raises(ValueError, match="completion"):
        lens.mask_logits(image, SENTENCES[0], completion)


def test_a_given_completion_draws_what_it_drew_when_it_was_written(lens, image):
    inputs = prepare(lens.processor, [(image, SENTENCES[0])], False)
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


def test_a_result_says_whether_it_ended_and_holds_a_box(lens, image, monkeypatch):
    """Boxes are clipped to the picture of 112 x 112 pixels; what has no area in it is none."""
    inputs = prepare(lens.processor, [(image, "it")], False)
    found = lens.respond(inputs, np.zeros(1, np.int32))
    monkeypatch.setattr(type(lens.processor), "box_to_pixels", lambda _, box, size: box)
    beyond = {
        (-5, 10, 500, 50): [0, 10, 112, 50],
        (120, 10, 500, 50): None,
        (10, 10, 10, 50): None,
        (50, 50, 10, 10): None,
        (0, 0, np.inf, 9): None,
        (np.nan, 0, 9, 9): None,
        (0, 0, 112, 112): [0, 0, 112, 112],
    }
    for box, clipped in beyond.items():
        made = found.replace(box=np.array([box], np.float32), box_found=np.array([True]))
        monkeypatch.setattr(lens, "respond", lambda *_, answer=made, **__: answer)
        result = lens.segment(image, "it")
        assert (result.box is None) == (clipped is None)
        assert clipped is None or result.box.tolist() == clipped
    for ended in (True, False):
        for format in ("grounding_format", "think_format"):
            formats = dict.fromkeys(found.formats, np.array([False]))
            made = found.replace(
                ended=np.array([ended]), formats=formats | {format: np.array([True])}
            )
            monkeypatch.setattr(lens, "respond", lambda *_, answer=made, **__: answer)
            result = lens.segment(image, "it", reasoning=format == "think_format")
            assert (result.ended, result.well_formed) == (ended, True)
            result = lens.segment(image, "it", reasoning=format != "think_format")
            assert (result.ended, result.well_formed) == (ended, False)


def test_drawn_completions_depend_on_the_seed(lens, image):
    first, again, other = (
        lens.segment(image, "it", temperature=2.0, seed=seed).completion for seed in (1, 1, 2)
    )
    assert first == again != other


def test_few_numbers_of_rows():
    assert [programs.bucket_rows(n) for n in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert [programs.bucket_rows(n, 3) for n in (1, 3, 4, 7, 12, 13)] == [3, 3, 6, 12, 12, 24]


def test_programs_serve_other_rows_and_prompts(lens, image, monkeypatch):
    """Three rows are decoded as four are; SAM does not care how long a sentence is.

    A stand-in is compiled in place of the language model, for the same shapes.
    """

    @partial(jax.jit, static_argnames=("definition", "max_new_tokens"))
    def write(state, prompts, sample_id, *_, definition, max_new_tokens):
        rows, config = len(prompts.tokens), lens.config
        tokens = jnp.ones((rows, 1, max_new_tokens), jnp.int32)
        ones = jnp.ones((rows, 1), jnp.int32)
        hidden = jnp.zeros((rows, 1, config.num_queries, config.mllm.hidden_size))
        return Rollout(tokens, ones, tokens * 0.0, ones > 0), None, hidden

    def compiled() -> tuple[int, int]:
        return write._cache_size(), programs.decode_masks._cache_size()

    monkeypatch.setattr(programs, "generate", write)
    assert len(lens.segment_batch([image] * 3, SENTENCES)) == 3
    once = compiled()
    assert len(lens.segment_batch([image] * 4, ["it"] * 4)) == 4
    assert compiled() == once
    lens.segment_batch([image] * 4, ["red " * 200] * 4)
    assert compiled() == (once[0] + 1, once[1])


def test_float32_multiplies_in_float32(lens, image, monkeypatch):
    """On GPUs and TPUs as well, whatever JAX's own setting: their products are marked so."""
    texts = {}

    def spy(name):
        program = getattr(programs, name)

        def call(*args, **options):
            texts[name] = program.lower(*args, **options).as_text()
            return program(*args, **options)

        monkeypatch.setattr(programs, name, call)

    for name in ("generate", "encode_queries", "decode_masks"):
        spy(name)
    with jax.default_matmul_precision("default"):
        lens.segment(image, SENTENCES[0])
        lens.mask_logits(image, SENTENCES[0], "it")
    for name, text in texts.items():
        products = [x for x in text.split("\n") if ".dot_general" in x or ".convolution" in x]
        assert len(products) > 5, name
        assert all("HIGHEST, HIGHEST" in x or x.count("precision HIGHEST") == 2 for x in products)
    assert len(texts) == 3


@pytest.mark.parametrize(
    ("images", "prompts", "reason"),
    [
        ("a", ["it"], "a list of images"),
        (1, ["it"], "a list of images"),
        ([1], "it", "a list of expressions"),
        ([1], None, "a list of expressions"),
        (frozenset("a"), ["it"], "an array [N, H, W, 3], not frozenset"),
        ([1, 1], ["it"], "2 images and 1 expression: "),
        ([1], [], "1 image and 0 expressions"),
        ([1], [None], "the expression is text, not NoneType"),
        ([1], [["it"]], "the expression is text, not list"),
        ([1, 1], ["it", " \n"], "the expression, number 2 of 2 is empty"),
        ([1, 2], ["it", "it"], "0 to 1, not 2 to 2"),
        (["none.png"], ["it"], "none.png: no such picture"),
    ],
)
def test_what_cannot_be_asked_is_one_line(lens, image, images, prompts, reason):
    pictures = {1: image, 2: np.full((5, 6), 2.0)}
    if isinstance(images, list):
        images = [pictures.get(x, x) for x in images]
    else:
        images = pictures.get(images, images)
    with pytest.raises(ValueError) as error:
        lens.segment_batch(images, prompts)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_wrong_options_are_one_line(lens, checkpoint, image):
    for prompt in (None, "", " ", ["it"], "\u200b", "\ufeff", "\x07", "a\ud800"):
        with pytest.raises(ValueError, match="the expression is"):
            lens.segment(image, prompt)
        with pytest.raises(ValueError, match="the expression is"):
            lens.mask_logits(image, prompt, "it")
    for temperature in (-1, float("nan"), float("inf"), 1e-40, 1e300, "a", None, True):
        with pytest.raises(ValueError, match="temperature"):
            lens.segment(image, "it", temperature=temperature)
    for seed in (2**70, 2**32, -1, 0.5, "a", None):
        with pytest.raises(ValueError, match="seed"):
            lens.segment(image, "it", seed=seed)
    for reasoning in ("false", None, 1):
        with pytest.raises(ValueError, match=r"reasoning: .* is neither True nor False"):
            lens.segment(image, "it", reasoning=reasoning)
    for precision in ("half", "", ["float32"]):
        with pytest.raises(ValueError, match="is none of float32, bfloat16"):
            Lens.from_pretrained(checkpoint, precision=precision)
    for mesh in (1, "cpu"):
        with pytest.raises(ValueError, match="mesh: "):
            Lens.from_pretrained(checkpoint, mesh=mesh)
    for directory in (None, 1, b"lens", [checkpoint]):
        with pytest.raises(ValueError, match="a checkpoint is the path of its directory, not "):
            Lens.from_pretrained(directory)


def test_a_sentence_that_is_too_long_names_the_limit(lens, image):
    with pytest.raises(ValueError, match=r"more than the 8,128 that can be read: shorten it by"):
        lens.segment(image, "red circle " * 9000)
