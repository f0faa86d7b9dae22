"""Inputs of a model: one prompt a row, static shapes, padding marked by lengths and masks."""

from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8


@struct.dataclass
class Prompts:
    """A batch of prompts, one image and one expression each, prepared on the host.

    `patches` holds the image in window order: W rows of S patches, each a window of the image or
    several small ones from its border. A window's merged units are row-major, a unit's patches
    contiguous. `patch_positions` are (row, column) in the image, `patch_mask` is False on padding.
    `image_index` says for every image token which merged unit (flat over windows) it shows, -1 for
    text. `positions` are Qwen's multimodal rotary positions and `next_position` the first one after
    the prompt.
    """

    patches: Float[Array, "B W S C"]
    patch_positions: Int[Array, "B W S 2"]
    patch_mask: Bool[Array, "B W S"]
    tokens: Int[Array, "B P"]
    image_index: Int[Array, "B P"]
    length: Int[Array, "B"]
    positions: Int[Array, "B 3 P"]
    next_position: Int[Array, "B"]
    sam_pixels: UInt8[Array, "B A A 3"]


@struct.dataclass
class Targets:
    """Targets of a batch of prompts.

    `box` is xyxy in the completion's coordinate scheme; `mask` lies in the upper left corner of a
    canvas, with its own (height, width) in `mask_size`; `answer` is the teacher-forced completion
    of stage 1, end token included.
    """

    box: Float[Array, "B 4"]
    mask: Bool[Array, "B H W"]
    mask_size: Int[Array, "B 2"]
    answer: Int[Array, "B T"]
    answer_length: Int[Array, "B"]


@struct.dataclass
class Batch:
    """Prompts and targets; `sample_id` (global sample index) keys all randomness of a row."""

    prompts: Prompts
    targets: Targets
    sample_id: Int[Array, "B"]
