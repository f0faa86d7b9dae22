"""From an image and an expression to what the model is fed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from lens_jax.data import images, processor_files, prompts
from lens_jax.data.batching import Example, Prompt, stack_prompts
from lens_jax.data.buckets import Buckets, Needs
from lens_jax.data.sample import Sample, to_rgb
from lens_jax.files import blaming
from lens_jax.models.geometry import ImageGeometry
from lens_jax.models.inputs import Prompts


class Processor:
    """Everything between an image with an expression and what the model is fed."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        sam_size: int,
        geometry: ImageGeometry = ImageGeometry(),  # noqa: B008 (frozen)
        templates: prompts.Templates = prompts.Templates(),  # noqa: B008 (frozen)
        coordinates: str = "qwen2p5vl",
        min_pixels: int = images.MIN_PIXELS,
        max_pixels: int = images.MAX_PIXELS,
        image_mean: Sequence[float] = images.MEAN,
        image_std: Sequence[float] = images.STD,
        familiar_aspect_ratio: float | None = None,
    ):
        prompts.coordinate_scale((1, 1), coordinates)  # refuses an unknown scheme
        self.tokenizer = tokenizer
        self.encoder = prompts.PromptTokenizer(tokenizer, templates)
        self.sam_size = sam_size
        self.geometry = geometry
        self.coordinates = coordinates
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.mean, self.std = tuple(image_mean), tuple(image_std)
        self.familiar_aspect_ratio = familiar_aspect_ratio

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Processor":
        """Reads a pretrained checkpoint's tokenizer, processor settings and lens_config.json.

        Raises:
            FileNotFoundError: one of the files is missing.
            CheckpointError: one of them says what is not supported; it names the file.
        """
        directory = Path(directory)
        file = directory / "lens_config.json"
        config = processor_files.read_json(file)
        with blaming(file):
            templates = prompts.Templates.from_dict(config.get("prompts", {}))
            coordinates = config.get("coordinates", "qwen2p5vl")
            prompts.coordinate_scale((1, 1), coordinates)
            vision = config["mllm"]["vision_config"]
            processor_files.check_patches(vision)
            options = dict(
                sam_size=config["sam"]["image_size"],
                geometry=_geometry(vision),
                templates=templates,
                coordinates=coordinates,
            )
        image = processor_files.read_images(directory)
        tokenizer, template_file = processor_files.read_tokenizer(directory)
        with blaming(template_file):
            return cls(
                tokenizer,
                min_pixels=image.min_pixels,
                max_pixels=image.max_pixels,
                image_mean=image.mean,
                image_std=image.std,
                familiar_aspect_ratio=image.familiar_aspect_ratio,
                **options,
            )

    def unfamiliar(self, size: tuple[int, int]) -> str | None:
        """A warning about an image of (height, width) if the model does less well on its kind."""
        familiar = self.familiar_aspect_ratio
        if familiar is None or max(size) <= familiar * min(size):
            return None
        return (
            f"a picture of {size[1]} x {size[0]} pixels: one side is over {familiar:g} times the "
            "other, and on such pictures this model's boxes and masks are less exact"
        )

    def prompt(
        self,
        image: UInt8[np.ndarray, "H W 3"] | Image.Image,
        expression: str,
        *,
        reasoning: bool = False,
        longest_side: int | None = None,
        antialias: bool = True,
    ) -> Prompt:
        """Prepares one image with one expression.

        Args:
            reasoning: ask for reasoning before the answer.
            longest_side: resize the language model's image to this longest side first.
            antialias: of SAM's image.

        Raises:
            ValueError: the image is more than 200 times as long as wide.
        """
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        image_size = (image.shape[0], image.shape[1])
        picture = image
        if longest_side is not None:
            picture = images.resize(image, images.longest_side(*image_size, longest_side))
        size, (source, patch_positions, slots) = self._layout(picture.shape[:2])
        patches, grid = images.patchify(
            images.resize(picture, size), self.mean, self.std, self.geometry
        )
        arranged, patch_mask = images.arrange_windows(patches, source)
        units = (grid[0] // self.geometry.merge_size, grid[1] // self.geometry.merge_size)
        tokens, start = self.encoder.prompt(expression, len(slots), reasoning)
        image_index = np.full(len(tokens), -1, np.int32)
        image_index[start : start + len(slots)] = slots
        positions, next_position = prompts.rope_positions(len(tokens), start, units)
        return Prompt(
            patches=arranged,
            patch_positions=patch_positions,
            patch_mask=patch_mask,
            tokens=tokens,
            image_index=image_index,
            positions=positions,
            next_position=next_position,
            sam_pixels=images.sam_pixels(image, self.sam_size, antialias),
            image_size=image_size,
            coordinate_scale=prompts.coordinate_scale(size, self.coordinates),
        )

    def example(self, sample: Sample, expression: str, *, reasoning: bool = False) -> Example:
        """Prepares a sample with one of its expressions."""
        prompt = self.prompt(
            sample.image,
            expression,
            reasoning=reasoning,
            longest_side=sample.longest_side,
            antialias=sample.antialias,
        )
        box, answer = self._answer(
            expression, sample.box, prompt.image_size, prompt.coordinate_scale
        )
        return Example(
            prompt=prompt,
            box=np.array(box or (0, 0, 0, 0), np.float32),
            mask=sample.mask,
            answer=answer,
        )

    def needs(
        self,
        image_size: tuple[int, int],
        expression: str,
        box: Float[np.ndarray, "4"] | None,
        *,
        reasoning: bool = False,
        longest_side: int | None = None,
    ) -> Needs:
        """`Example.needs` of an image of this (height, width), without its pixels."""
        picture = image_size
        if longest_side is not None:
            picture = images.longest_side(*image_size, longest_side)
        size, (source, _, slots) = self._layout(picture)
        tokens, _ = self.encoder.prompt(expression, len(slots), reasoning)
        scale = prompts.coordinate_scale(size, self.coordinates)
        _, answer = self._answer(expression, box, image_size, scale)
        return Needs(len(source), len(tokens), len(answer))

    def _layout(self, picture: tuple[int, ...]) -> tuple[tuple[int, int], tuple[np.ndarray, ...]]:
        """The size that the language model's image is resized to, and its `window_layout`."""
        size, geometry = self.resized(picture), self.geometry
        grid = (size[0] // geometry.patch_size, size[1] // geometry.patch_size)
        return size, images.window_layout(grid, geometry.window_units, geometry.merge_size)

    def resized(self, image_size: tuple[int, ...]) -> tuple[int, int]:
        """The (height, width) that the vision tower gets of an image of this (height, width)."""
        return images.smart_resize(
            *image_size, self.min_pixels, self.max_pixels, self.geometry.unit_size
        )

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """The number of tokens that an image of this (height, width) takes."""
        height, width = self.resized(image_size)
        return height * width // self.geometry.unit_size**2

    def _answer(
        self,
        expression: str,
        box: Float[np.ndarray, "4"] | None,
        image_size: tuple[int, int],
        scale: tuple[int, int],
    ) -> tuple[Sequence[int] | None, Int[np.ndarray, "T"]]:
        """A box as the text writes it, and the tokens of stage 1's answer."""
        written = None if box is None else prompts.box_to_text(box, image_size, scale)
        return written, self.encoder.answer(expression, written)

    def prompts(
        self,
        pictures: Sequence[UInt8[np.ndarray, "H W 3"] | Image.Image],
        expressions: Sequence[str],
        *,
        reasoning: bool = False,
        buckets: Buckets | None = None,
    ) -> Prompts:
        """A batch for inference; without buckets it is padded to its largest row."""
        rows = [
            self.prompt(picture, expression, reasoning=reasoning)
            for picture, expression in zip(pictures, expressions, strict=True)
        ]
        return stack_prompts(rows, buckets)

    def box_to_pixels(
        self, box: Sequence[float], image_size: tuple[int, int]
    ) -> Float[np.ndarray, "4"]:
        """A box that the text writes, as xyxy pixels of the original image (height, width)."""
        scale = prompts.coordinate_scale(self.resized(image_size), self.coordinates)
        return prompts.box_to_pixels(box, image_size, scale)


def _geometry(vision: Mapping[str, Any]) -> ImageGeometry:
    """The geometry that a vision_config names; a null counts as left out."""
    keys = {"spatial_merge_size": "merge_size"}
    keys |= {name: name for name in ("patch_size", "temporal_patch_size", "window_size")}
    return ImageGeometry(**{keys[key]: vision[key] for key in keys if vision.get(key)})
