"""`Lens`: a pretrained checkpoint that segments what expressions describe."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Bool, Float, Int

from lens_jax import checkpoints, libtpu
from lens_jax.data.images import upsample_logits
from lens_jax.data.processor import Processor
from lens_jax.data.sources.annotations import short
from lens_jax.distribution import sharding
from lens_jax.inference import inputs, programs
from lens_jax.inference.generation import Generation
from lens_jax.inference.inputs import ImageLike
from lens_jax.models.inputs import Prompts
from lens_jax.models.lens import LensConfig, abstract
from lens_jax.models.long_attention import Attention
from lens_jax.models.precision import DTYPES, default, products
from lens_jax.rewards import text_rewards
from lens_jax.rollout.sampling import GREEDY, Sampling

log = logging.getLogger("lens_jax")


@dataclasses.dataclass(frozen=True)
class Result:
    """LENS's answer to one image and one expression.

    `completion` leaves special tokens out. `box` is xyxy in pixels of the original image, clipped
    to it (the completion keeps what was said); None if the completion holds none, or one that has
    no area within the image. `mask_logits` are the mask decoder's, at low resolution. `ended` is
    False where the completion was cut off at the checkpoint's max_new_tokens; `well_formed` says
    whether it has the form that training rewards: that of grounding or, with `reasoning`, of
    reasoning.
    """

    completion: str
    box: Float[np.ndarray, "4"] | None
    mask: Bool[np.ndarray, "H W"]
    mask_logits: Float[np.ndarray, "h w"]
    ended: bool
    well_formed: bool


@struct.dataclass
class Responses:
    """A batch of completions, read, on the host; boxes in the text's coordinates."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    ended: Bool[np.ndarray, "B"]
    mask_logits: Float[np.ndarray, "B h w"]
    box: Float[np.ndarray, "B 4"]
    box_found: Bool[np.ndarray, "B"]
    formats: dict[str, Bool[np.ndarray, "B"]]


def format_of(reasoning: bool) -> str:
    """The format reward of `rewards.sentence` that says whether a completion is well formed."""
    return "think_format" if reasoning else "grounding_format"


class Lens:
    """A LENS model with everything between images and masks; greedy unless told otherwise.

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
            precision: type of matrix products, `bfloat16` or `float32` (on accelerators, too);
                by default float32 on CPU, bfloat16 elsewhere.

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
        # These come before the weights, which take longer: a mistake in them is told at once.
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

    def segment(self, image: ImageLike, prompt: str, **options) -> Result:
        """Segments what `prompt` describes; options and errors as for `segment_batch`.

        An image is a path, a PIL image or an array (or tensor) of shape [H, W, 3], [H, W],
        [H, W, 1 | 4] or [1 | 3 | 4, H, W]: uint8 of 0 to 255, bool, floats of 0 to 1, or uint16 of
        0 to 65,535. An array that may be read in several ways is refused.
        """
        return self.segment_batch([image], [prompt], **options)[0]

    def segment_batch(
        self,
        images: Sequence[ImageLike],
        prompts: Sequence[str],
        *,
        reasoning: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Result]:
        """Segments one image for each prompt.

        They are decoded together, filled up to 1, 2, 4, 8, ... rows on each device. Masks and boxes
        lie on the upright image.

        Args:
            images: as for `segment`, or an array [N, H, W, 3]. Paths and PIL images are turned
                upright as their EXIF orientation says.
            prompts: bare expressions; the checkpoint's template goes around them. With its
                image a prompt may have 8,128 tokens. Checkpoints were trained on short ones: a far
                longer one is read as a whole, but seldom understood.
            reasoning: ask for a line of reasoning before the answer.
            temperature: 0 is greedy; from 1e-6 to 1e6, completions are sampled.
            seed: of the sampling, 0 to 2**32 - 1; a completion depends on it and on its place in
                the batch.

        Logs a warning of images longer than suits the model (`Processor.unfamiliar`), once for
        each size.

        Raises:
            ValueError: an image that cannot be read, an expression that is empty or too long
                (`check_length`), not one expression an image, or an option of another kind.
        """
        inputs.check_sampling(temperature, seed)
        asked = inputs.read_images(images, prompts)
        if not asked:
            return []
        parts = sharding.num_parts(self.mesh) if self.mesh else 1
        rows = programs.bucket_rows(len(asked), parts)
        batch = inputs.prepare(self.processor, asked, reasoning, rows=rows)
        sampling = Sampling(temperature=temperature) if temperature else None
        ids = np.arange(rows, dtype=np.int32)
        responses = self.respond(batch, ids, seed=seed, sampling=sampling)
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
                box = _clip(self.processor.box_to_pixels(responses.box[i], size), size)
            results.append(
                Result(
                    completion=self.completion_text(responses, i),
                    box=box,
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
        """Completes a prepared batch and decodes its masks; greedy by default.

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
        static = {"definition": self.definition}
        with products(self.precision):
            rollout, embedded, hidden = programs.generate(
                self.state,
                prompts,
                sample_id,
                jax.random.key(seed),
                sampling,
                np.array(self.generation.end_tokens, np.int32),
                limit,
                max_new_tokens=programs.bucket_length(longest),
                **static,
            )
            kept = programs.bucket_length(int(rollout.lengths.max()))
            tokens, lengths = rollout.tokens[:, 0, :kept], rollout.lengths[:, 0]
            if hidden is None:
                hidden = programs.encode_queries(
                    self.state, prompts, embedded, tokens, lengths, **static
                )
            _, logits = programs.decode_masks(self.state, prompts.sam_pixels, hidden, **static)
            text = dict(self._read_text(tokens, lengths))
        tokens, lengths, ended, logits, text = self._take(
            (tokens, lengths, rollout.ended[:, 0], logits, text)
        )
        box, found = text.pop("box"), text.pop("box_found")
        return Responses(tokens, lengths, ended, logits.astype(np.float32), box, found, text)

    def completion_text(self, responses: Responses, index: int) -> str:
        """A completion as text, special tokens left out."""
        ids = responses.tokens[index, : responses.lengths[index]]
        return self.processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def context_embedding(
        self, image: ImageLike, prompt: str, completion: str | Sequence[int], *, reasoning=False
    ) -> Float[np.ndarray, "E"]:
        """SAM's prompt token for a given completion (text, or tokens after the prompt)."""
        return self._decode(image, prompt, completion, reasoning)[0]

    def mask_logits(
        self, image: ImageLike, prompt: str, completion: str | Sequence[int], *, reasoning=False
    ) -> Float[np.ndarray, "h w"]:
        """Low-resolution mask logits for a given completion (text, or tokens after the prompt)."""
        return self._decode(image, prompt, completion, reasoning)[1]

    def _decode(self, image, prompt, completion, reasoning):
        """SAM's prompt token and mask logits for a given completion."""
        ids = inputs.completion_tokens(self.processor, completion, self.config.mllm.vocab_size)
        tokens = np.pad(ids, (0, programs.bucket_length(max(1, len(ids))) - len(ids)))[None]
        lengths = np.array([len(ids)], np.int32)
        prompts = inputs.prepare(self.processor, inputs.read_images([image], [prompt]), reasoning)
        static = {"definition": self.definition}
        with products(self.precision):
            hidden = programs.encode_queries(self.state, prompts, None, tokens, lengths, **static)
            decoded = programs.decode_masks(self.state, prompts.sam_pixels, hidden, **static)
        return tuple(np.asarray(x[0], np.float32) for x in decoded)

    def _place(self, batch):
        if self.mesh is None:
            return batch
        return sharding.global_batch(batch, self.mesh)

    def _take(self, batch):
        return jax.device_get(batch) if self.mesh is None else sharding.own_rows(batch, self.mesh)


def _clip(box: Float[np.ndarray, "4"], size: tuple[int, int]) -> Float[np.ndarray, "4"] | None:
    """The part of an xyxy box that lies in an image [H, W]; None if that has no area."""
    inside = np.clip(box, 0, np.array([size[1], size[0]] * 2, np.float32))
    return inside if np.isfinite(box).all() and (inside[2:] > inside[:2]).all() else None
