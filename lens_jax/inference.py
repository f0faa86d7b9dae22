"""Masks from sentences: a pretrained checkpoint as one object."""

import dataclasses
import logging
import numbers
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8
from PIL import Image

from lens_jax import checkpoints, libtpu
from lens_jax.data import processor_files
from lens_jax.data.arrays import to_picture
from lens_jax.data.images import FACTOR, smart_resize, upsample_logits
from lens_jax.data.pipeline import Buckets, Processor, stack_prompts
from lens_jax.data.sources.annotations import sentence, short
from lens_jax.distribution import sharding
from lens_jax.models.attention import Attention
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.precision import DTYPES, default, products
from lens_jax.progress import counted
from lens_jax.rewards import text_rewards
from lens_jax.rollout.sampler import Rollout, generate
from lens_jax.rollout.sampling import GREEDY, Sampling

log = logging.getLogger("lens_jax")

Picture = str | os.PathLike[str] | Image.Image | Shaped[np.ndarray, "..."]

# Shapes are rounded up to these, so that pictures of any size share a few compiled programs.
BUCKETS = Buckets(
    prompt_tokens=range(64, 8192, 64),
    windows=(1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 49, 64, 81, 100, 121, 144, 256, 512),
    canvas=((1, 1),),
    answer_tokens=(1,),
)
COMPLETION_BUCKET = 32
LONGEST_COMPLETION = 4096  # of completions that are given


@dataclasses.dataclass(frozen=True)
class Result:
    """What LENS makes of one picture and one sentence.

    `completion` leaves special tokens out. `box` is xyxy in pixels of the original picture, clipped
    to it (the completion keeps what was said); None if the completion holds none, or one that has
    no area within the picture. `mask_logits` are the mask decoder's, at low resolution. `ended` is
    False where the completion was cut off at the checkpoint's max_new_tokens; `well_formed` says
    whether it has the form that training rewards: of grounding, with `reasoning` of thought.
    """

    completion: str
    box: Float[np.ndarray, "4"] | None
    mask: Bool[np.ndarray, "H W"]
    mask_logits: Float[np.ndarray, "h w"]
    ended: bool
    well_formed: bool


@dataclasses.dataclass(frozen=True)
class Generation:
    """When a completion ends, and what greedy decoding does on the way (generation_config.json)."""

    end_tokens: tuple[int, ...]
    repetition_penalty: float = 1.0
    max_new_tokens: int = 768

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Generation":
        """Reads a pretrained checkpoint's generation_config.json and lens_config.json."""
        directory = Path(directory)
        config = checkpoints.read_config(directory)
        vocab_size = checkpoints.model_shapes(directory, config).mllm.vocab_size
        settings = processor_files.read_generation(directory, vocab_size)
        limit = config.get("max_new_tokens", cls.max_new_tokens)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise checkpoints.CheckpointError(
                f"{directory / checkpoints.CONFIG}: max_new_tokens: expected a positive whole "
                f"number, found {limit!r}"
            )
        return cls(settings.end_tokens, settings.repetition_penalty, limit)


@struct.dataclass
class Responses:
    """A batch of completions with what they say, on the host; boxes in the text's coordinates."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    ended: Bool[np.ndarray, "B"]
    mask_logits: Float[np.ndarray, "B h w"]
    box: Float[np.ndarray, "B 4"]
    box_found: Bool[np.ndarray, "B"]
    formats: dict[str, Bool[np.ndarray, "B"]]


@partial(jax.jit, static_argnames=("definition", "max_new_tokens"))
def write(
    state, prompts: Prompts, sample_id, key, sampling, ends, limit, *, definition, max_new_tokens
) -> tuple[Rollout, Array, Array | None]:
    """Completions, the embedded prompts, and the queries' hidden states if the caches serve them.

    They do where the mask pass has the rollout's positions; otherwise everything is read again.
    """
    model = nnx.merge(definition, state)
    embedded = model.embed(prompts)
    written, *caches = generate(
        model,
        prompts,
        embedded,
        sample_id,
        key,
        num_completions=1,
        max_new_tokens=max_new_tokens,
        end_tokens=ends,
        sampling=sampling,
        limit=limit,
    )
    hidden = None
    if model.config.context_positions == "mrope":
        hidden = model.read_on(prompts, written.tokens, written.lengths, *caches)
    return written, embedded, hidden


@partial(jax.jit, static_argnames=("definition",))
def embed(state, prompts: Prompts, *, definition) -> Array:
    """Embedded prompts [B, P, D], what `write` gives besides."""
    return nnx.merge(definition, state).embed(prompts)


@partial(jax.jit, static_argnames=("definition",))
def read(state, prompts: Prompts, embedded, tokens, lengths, *, definition) -> Array:
    """The queries' hidden states [B, M, D] after given completions [B, T]."""
    return nnx.merge(definition, state).read(prompts, embedded, tokens, lengths)


@partial(jax.jit, static_argnames=("definition",))
def draw(state, sam_pixels, hidden, *, definition) -> tuple[Array, Array]:
    """SAM's prompt token [B, E] and mask logits [B, h, w] from the queries' hidden states.

    Of the prompts it takes the pixels [B, A, A, 3] alone, which are of one size whatever the
    prompts' buckets: it is compiled once for a number of rows.
    """
    model = nnx.merge(definition, state)
    features = model.sam.encode(model.sam.normalize(sam_pixels))
    masks = model.masks(features, hidden, stability=True)
    return model.context(hidden)[:, 0], masks.logits[:, 0]


def check_draw(temperature: float, seed: int) -> None:
    """Raises ValueError for a temperature that float32 does not divide by, or a seed of more bits
    than a key has: JAX would take others with the same lower bits for it."""
    real = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not (real and (temperature == 0 or 1e-6 <= temperature <= 1e6)):
        raise ValueError(f"temperature: {short(temperature)} is neither 0 nor within 1e-6 to 1e6")
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= seed < 2**32):
        raise ValueError(f"seed: {short(seed)} is not a whole number of 0 to {2**32 - 1}")


def check_length(
    processor: Processor, image_size: tuple[int, int], prompt: str, reasoning: bool = False
) -> None:
    """Raises ValueError for a sentence that together with its picture [H, W] is too long to be
    read, or a picture that is too narrow to be resized."""
    height, width = smart_resize(*image_size, processor.min_pixels, processor.max_pixels)
    picture = (height // FACTOR) * (width // FACTOR)
    length = len(processor.encoder.prompt(prompt, picture, reasoning)[0])
    longest = max(BUCKETS.prompt_tokens)
    if length > longest:
        raise ValueError(
            f"the sentence {prompt[:40]!r}... and the picture take {length:,} tokens, more than "
            f"the {longest:,} that can be read: shorten it by about {length - longest:,}"
        )


def format_of(reasoning: bool) -> str:
    """The format reward of `rewards.sentence` that says whether a completion is well formed."""
    return "think_format" if reasoning else "grounding_format"


def clipped(box: Float[np.ndarray, "4"], size: tuple[int, int]) -> Float[np.ndarray, "4"] | None:
    """The part of an xyxy box that lies in a picture [H, W]; None if that has no area."""
    inside = np.clip(box, 0, np.array([size[1], size[0]] * 2, np.float32))
    return inside if np.isfinite(box).all() and (inside[2:] > inside[:2]).all() else None


def round_up(length: int) -> int:
    """How many tokens completions of up to `length` take."""
    return -(-length // COMPLETION_BUCKET) * COMPLETION_BUCKET


def bucket_rows(rows: int, parts: int = 1) -> int:
    """How many rows are decoded for so many: in each of `parts` 1, 2, 4, 8, ...

    Few numbers of rows, few compiled programs.
    """
    return parts << (-(-rows // parts) - 1).bit_length()


def _questions(
    images: Sequence[Picture], prompts: Sequence[str]
) -> list[tuple[UInt8[np.ndarray, "H W 3"], str]]:
    """Pictures as arrays with their sentences. Raises ValueError for what is neither."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        raise ValueError(f"give a list of sentences, not {type(prompts).__name__}")
    shape = getattr(images, "shape", None)  # of arrays and tensors of any library
    several = isinstance(images, Sequence) if shape is None else len(shape) == 4
    if not several or isinstance(images, str | bytes):
        what = type(images).__name__ if shape is None else f"one of shape {tuple(shape)}"
        raise ValueError(f"give a list of pictures, or an array [N, H, W, 3], not {what}")
    if len(images) != len(prompts):
        raise ValueError(
            f"{counted(len(images), 'picture')} and {counted(len(prompts), 'sentence')}: give one "
            "sentence a picture"
        )
    asked = []
    for number, (image, prompt) in enumerate(zip(images, prompts, strict=True), start=1):
        where = f", number {number} of {len(images)}" if len(images) > 1 else ""
        if not isinstance(prompt, str):
            raise ValueError(f"the sentence{where} is text, not {type(prompt).__name__}")
        try:
            sentence(prompt, f"the sentence{where}")
        except ValueError as error:
            raise ValueError(f"{error}: say what to segment") from None
        try:
            asked.append((to_picture(image), prompt))
        except ValueError as error:
            raise ValueError(f"{error} (picture{where})" if where else str(error)) from error
    return asked


class Lens:
    """A LENS model with everything between pictures and masks; greedy unless told otherwise.

    `state` may be replaced by another of the same shapes, as training does between evaluations.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        state: nnx.State,
        processor: Processor,
        generation: Generation,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.definition, self.state = definition, state
        model = nnx.merge(definition, state)
        self.config: LensConfig = model.config
        self.precision = "float32" if model.sam.dtype == jnp.float32 else "bfloat16"
        self.processor, self.generation, self.mesh = processor, generation, mesh
        read_text = text_rewards(processor.tokenizer)
        self._read_text = jax.jit(sharding.by_rows(read_text, mesh) if mesh else read_text)
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        mesh: jax.sharding.Mesh | None = None,
        precision: str | None = None,
    ) -> "Lens":
        """Loads a pretrained checkpoint (`runs/x/final`, or what tools.convert_weights wrote).

        Args:
            mesh: devices that share a batch; None takes one device.
            precision: of matrix products, `bfloat16` or `float32` (on accelerators, too); by
                default float32 on CPU, bfloat16 elsewhere.

        Raises:
            CheckpointError: the directory is missing, incomplete or damaged.
            ValueError: there is no such precision or mesh, or `directory` is no path.
        """
        if not isinstance(directory, str | os.PathLike):
            raise ValueError(
                f"a checkpoint is the path of its directory, not {type(directory).__name__}"
            )
        if not isinstance(mesh, jax.sharding.Mesh | None):
            raise ValueError(
                f"mesh: {short(mesh)} is no mesh; lens_jax.distribution.sharding.make_mesh makes "
                "one, None is one device"
            )
        libtpu.pass_over_if_absent()
        precision = default() if precision is None else precision
        if not isinstance(precision, str) or precision not in DTYPES:
            raise ValueError(f"precision: {precision!r} is none of {', '.join(DTYPES)}")
        dtype = DTYPES[precision]
        # Before the weights, which take longer: a mistake in these is said at once.
        config = checkpoints.model_shapes(directory, checkpoints.read_config(directory))
        processor = Processor.from_pretrained(directory)
        generation = Generation.from_pretrained(directory)
        _, params = checkpoints.load_pretrained(directory, dtype=dtype)
        params.pop("unused", None)
        attention = Attention.choose("auto", mesh, dtype=dtype, head_dims=config.head_dims)
        definition, state = nnx.split(abstract(config, dtype=dtype, attention=attention))
        nnx.replace_by_pure_dict(state, params)
        state = jax.device_put(state, sharding.replicated(mesh) if mesh else jax.devices()[0])
        return cls(definition, state, processor, generation, mesh)

    def segment(self, image: Picture, prompt: str, **options) -> Result:
        """Segments what `prompt` describes; options and errors as for `segment_batch`.

        A picture is a path, a PIL image or an array (or tensor) of shape [H, W, 3], [H, W],
        [H, W, 1 | 4] or [1 | 3 | 4, H, W]: uint8 of 0 to 255, bool, floats of 0 to 1, or uint16 of
        0 to 65,535. What may be read in several ways is refused.
        """
        return self.segment_batch([image], [prompt], **options)[0]

    def segment_batch(
        self,
        images: Sequence[Picture],
        prompts: Sequence[str],
        *,
        reasoning: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Result]:
        """Segments one picture for each prompt.

        They are decoded together, filled up to 1, 2, 4, 8, ... rows on each device. Masks and boxes
        lie on the upright picture.

        Args:
            images: pictures, as for `segment`, or an array [N, H, W, 3] of them. Paths and PIL
                images are turned upright as their EXIF orientation says.
            prompts: bare expressions; the checkpoint's template goes around them.
            reasoning: ask for a line of thought before the answer.
            temperature: 0 is greedy; above, 1e-6 to 1e6, completions are drawn.
            seed: of the draw, 0 to 2**32 - 1; a completion depends on it and on its place in the
                batch.

        Logs a warning of pictures longer than suits the model (`Processor.unfamiliar`), once for
        each size.

        Raises:
            ValueError: a picture that cannot be read, a sentence that is empty or too long
                (`check_length`), not one sentence a picture, or an option of another kind.
        """
        check_draw(temperature, seed)
        asked = _questions(images, prompts)
        if not asked:
            return []
        rows = bucket_rows(len(asked), sharding.num_parts(self.mesh) if self.mesh else 1)
        inputs = self._prompts(asked, reasoning, rows=rows)
        sampling = Sampling(temperature=temperature) if temperature else None
        ids = np.arange(rows, dtype=np.int32)
        responses = self.respond(inputs, ids, seed=seed, sampling=sampling)
        results = []
        for i, (image, _) in enumerate(asked):
            size = image.shape[:2]
            warning = self.processor.unfamiliar(size)
            if warning and warning not in self._warned:
                self._warned.add(warning)
                log.warning("%s", warning)
            low = responses.mask_logits[i]
            box = None
            if responses.box_found[i]:
                box = self.processor.box_to_pixels(responses.box[i], size)
            results.append(
                Result(
                    completion=self.completion_text(responses, i),
                    box=None if box is None else clipped(box, size),
                    mask=upsample_logits(low, size) > 0,
                    mask_logits=low,
                    ended=bool(responses.ended[i]),
                    well_formed=bool(responses.formats[format_of(reasoning)][i]),
                )
            )
        return results

    def respond(
        self,
        prompts: Prompts,
        sample_id: Int[np.ndarray, "B"],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        limit: Int[np.ndarray, "B"] | None = None,
    ) -> Responses:
        """Completes a prepared batch and draws the masks; greedy by default.

        `limit` holds how many tokens each completion may have, if that is less than the
        checkpoint's max_new_tokens. Where several processes share the mesh, each gives and gets
        its own rows (`sharding.share`).
        """
        if sampling is None:
            penalty = self.generation.repetition_penalty
            sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
        longest = self.generation.max_new_tokens
        limit = np.minimum(longest if limit is None else limit, np.full(len(sample_id), longest))
        prompts, sample_id, limit = self._place((prompts, sample_id, limit.astype(np.int32)))
        with products(self.precision):
            written, embedded, hidden = write(
                self.state,
                prompts,
                sample_id,
                jax.random.key(seed),
                sampling,
                np.array(self.generation.end_tokens, np.int32),
                limit,
                definition=self.definition,
                max_new_tokens=round_up(longest),
            )
            kept = round_up(int(written.lengths.max()))
            tokens, lengths = written.tokens[:, 0, :kept], written.lengths[:, 0]
            if hidden is None:
                hidden = read(
                    self.state, prompts, embedded, tokens, lengths, definition=self.definition
                )
            _, logits = draw(self.state, prompts.sam_pixels, hidden, definition=self.definition)
            text = dict(self._read_text(tokens, lengths))
        tokens, lengths, ended, logits, text = self._take(
            (tokens, lengths, written.ended[:, 0], logits, text)
        )
        box, found = text.pop("box"), text.pop("box_found")
        return Responses(tokens, lengths, ended, logits.astype(np.float32), box, found, text)

    def completion_text(self, responses: Responses, index: int) -> str:
        """A completion as text, special tokens left out."""
        ids = responses.tokens[index, : responses.lengths[index]]
        return self.processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def context_embedding(
        self, image: Picture, prompt: str, completion: str | Sequence[int], *, reasoning=False
    ) -> Float[np.ndarray, "E"]:
        """What SAM is prompted with, for a given completion (text, or tokens after the prompt)."""
        return self._draw_given(image, prompt, completion, reasoning)[0]

    def mask_logits(
        self, image: Picture, prompt: str, completion: str | Sequence[int], *, reasoning=False
    ) -> Float[np.ndarray, "h w"]:
        """Low-resolution mask logits for a given completion (text, or tokens after the prompt)."""
        return self._draw_given(image, prompt, completion, reasoning)[1]

    def _draw_given(self, image, prompt, completion, reasoning):
        ids = self._given(completion)
        tokens = np.pad(ids, (0, round_up(max(1, len(ids))) - len(ids)))[None]
        lengths = np.array([len(ids)], np.int32)
        prompts = self._prompts(_questions([image], [prompt]), reasoning)
        static = {"definition": self.definition}
        with products(self.precision):
            embedded = embed(self.state, prompts, **static)
            hidden = read(self.state, prompts, embedded, tokens, lengths, **static)
            drawn = draw(self.state, prompts.sam_pixels, hidden, **static)
        return tuple(np.asarray(x[0], np.float32) for x in drawn)

    def _given(self, completion: str | Sequence[int]) -> Int[np.ndarray, "T"]:
        """The tokens of a given completion; ValueError for what is none."""
        if isinstance(completion, str):
            ids = self.processor.encoder.encode(completion)
        else:
            try:
                ids = np.asarray(completion)
            except ValueError:  # lists of several lengths
                ids = np.empty((0, 0))
            vocabulary = self.config.mllm.vocab_size
            whole = ids.ndim == 1 and (np.issubdtype(ids.dtype, np.integer) or not ids.size)
            if not whole or ((ids < 0) | (ids >= vocabulary)).any():
                raise ValueError(
                    f"a completion is a text or a list of token ids from 0 to {vocabulary - 1}"
                )
        if len(ids) > LONGEST_COMPLETION:
            raise ValueError(
                f"the completion has {len(ids)} tokens, more than {LONGEST_COMPLETION}: shorten it"
            )
        return ids.astype(np.int32)

    def _prompts(
        self, asked: Sequence[tuple[np.ndarray, str]], reasoning: bool, *, rows: int = 1
    ) -> Prompts:
        """A batch of pictures with their sentences; copies of the last make it `rows`."""
        if not isinstance(reasoning, bool | np.bool_):
            raise ValueError(f"reasoning: {short(reasoning)} is neither True nor False")
        reasoning = bool(reasoning)
        made = []
        for image, prompt in asked:
            check_length(self.processor, image.shape[:2], prompt, reasoning)
            made.append(self.processor.prompt(image, prompt, reasoning=reasoning))
        return stack_prompts(made + made[-1:] * (rows - len(made)), BUCKETS)

    def _place(self, batch):
        if self.mesh is None:
            return batch
        return sharding.global_batch(batch, self.mesh)

    def _take(self, batch):
        return jax.device_get(batch) if self.mesh is None else sharding.own_rows(batch, self.mesh)
