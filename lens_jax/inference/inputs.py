"""Images, expressions, completions and options as users give them: checked, then prepared."""

import numbers
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

from lens_jax.data.arrays import to_picture
from lens_jax.data.batching import stack_prompts
from lens_jax.data.buckets import Buckets
from lens_jax.data.processor import Processor
from lens_jax.data.sources.annotations import sentence, short
from lens_jax.models.inputs import Prompts
from lens_jax.progress import counted

ImageLike = str | os.PathLike[str] | Image.Image | Shaped[np.ndarray, "..."]

# Shapes are rounded up to these, so that images of any size share a few compiled programs.
BUCKETS = Buckets(
    prompt_tokens=range(64, 8192, 64),
    windows=(1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 49, 64, 81, 100, 121, 144, 256, 512),
    canvas=((1, 1),),
    answer_tokens=(1,),
)
LONGEST_COMPLETION = 4096  # tokens of a completion that is given


def check_sampling(temperature: float, seed: int) -> None:
    """Raises ValueError for a temperature that float32 does not divide by, or a seed of more bits
    than a key has: JAX would take others with the same lower bits for it."""
    real = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not (real and (temperature == 0 or 1e-6 <= temperature <= 1e6)):
        raise ValueError(f"temperature: {short(temperature)} is neither 0 nor within 1e-6 to 1e6")
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not (whole and 0 <= seed < 2**32):
        raise ValueError(f"seed: {short(seed)} is not a whole number of 0 to {2**32 - 1}")


def check_length(
    processor: Processor, image_size: tuple[int, int], expression: str, reasoning: bool = False
) -> None:
    """Raises ValueError for an expression that together with its image [H, W] is too long to be
    read, or an image that is too narrow to be resized."""
    image_tokens = processor.image_tokens(image_size)
    length = len(processor.encoder.prompt(expression, image_tokens, reasoning)[0])
    longest = max(BUCKETS.prompt_tokens)
    if length > longest:
        raise ValueError(
            f"the expression {expression[:40]!r}... and the image take {length:,} tokens, more "
            f"than the {longest:,} that can be read: shorten it by about {length - longest:,}"
        )


def read_images(
    images: Sequence[ImageLike], expressions: Sequence[str]
) -> list[tuple[UInt8[np.ndarray, "H W 3"], str]]:
    """Images as arrays, with their expressions. Raises ValueError for what is neither."""
    if isinstance(expressions, str) or not isinstance(expressions, Sequence | np.ndarray):
        raise ValueError(f"give a list of expressions, not {type(expressions).__name__}")
    shape = getattr(images, "shape", None)  # of arrays and tensors of any library
    several = isinstance(images, Sequence) if shape is None else len(shape) == 4
    if not several or isinstance(images, str | bytes):
        what = type(images).__name__ if shape is None else f"one of shape {tuple(shape)}"
        raise ValueError(f"give a list of images, or an array [N, H, W, 3], not {what}")
    if len(images) != len(expressions):
        raise ValueError(
            f"{counted(len(images), 'image')} and {counted(len(expressions), 'expression')}: give "
            "one expression for each image"
        )
    read = []
    for number, (image, expression) in enumerate(zip(images, expressions, strict=True), start=1):
        where = f", number {number} of {len(images)}" if len(images) > 1 else ""
        if not isinstance(expression, str):
            raise ValueError(f"the expression{where} is text, not {type(expression).__name__}")
        try:
            sentence(expression, f"the expression{where}")
        except ValueError as error:
            raise ValueError(f"{error}: say what to segment") from None
        try:
            read.append((to_picture(image), expression))
        except ValueError as error:
            raise ValueError(f"{error} (image{where})" if where else str(error)) from error
    return read


def prepare(
    processor: Processor,
    images: Sequence[tuple[UInt8[np.ndarray, "H W 3"], str]],
    reasoning: bool,
    *,
    rows: int = 1,
) -> Prompts:
    """A batch of images with their expressions; copies of the last make it `rows`."""
    if not isinstance(reasoning, bool | np.bool_):
        raise ValueError(f"reasoning: {short(reasoning)} is neither True nor False")
    made = []
    for image, expression in images:
        check_length(processor, image.shape[:2], expression, bool(reasoning))
        made.append(processor.prompt(image, expression, reasoning=bool(reasoning)))
    return stack_prompts(made + made[-1:] * (rows - len(made)), BUCKETS)


def completion_tokens(
    processor: Processor, completion: str | Sequence[int], vocabulary: int
) -> Int[np.ndarray, "T"]:
    """The tokens of a given completion; ValueError for what is none."""
    if isinstance(completion, str):
        ids = processor.encoder.encode(completion)
    else:
        try:
            ids = np.asarray(completion)
        except ValueError:  # lists of several lengths
            ids = np.empty((0, 0))
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
