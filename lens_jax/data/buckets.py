"""The static shapes of batches, and what an example takes of them."""

import dataclasses
from collections.abc import Sequence

from lens_jax.data import images


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The static shapes of batches: a batch takes the smallest of each that holds all its rows."""

    prompt_tokens: Sequence[int] = (512, 1408)
    windows: Sequence[int] = (91,)
    canvas: Sequence[tuple[int, int]] = ((640, 640),)
    answer_tokens: Sequence[int] = (64,)

    def __post_init__(self):
        largest = self.largest_canvas
        if any(c[0] > largest[0] or c[1] > largest[1] for c in self.canvas):
            raise ValueError(f"canvas: none of {list(self.canvas)} holds all the others")

    @property
    def largest_canvas(self) -> tuple[int, int]:
        return max(self.canvas, key=lambda canvas: canvas[0] * canvas[1])

    def shrink(self, mask_size: tuple[int, ...]) -> bool:
        """Whether a mask of this (height, width) is larger than every canvas: it is not refused,
        but trains at a lower resolution."""
        return images.is_shrunken(mask_size, self.largest_canvas)

    def largest(self) -> "Buckets":
        """Only the largest of each: one shape, whatever the samples."""
        return Buckets(
            prompt_tokens=(max(self.prompt_tokens),),
            windows=(max(self.windows),),
            canvas=(self.largest_canvas,),
            answer_tokens=(max(self.answer_tokens),),
        )


@dataclasses.dataclass(frozen=True)
class Needs:
    """Sizes of an example, by the names of the buckets that must hold them."""

    windows: int
    prompt_tokens: int
    answer_tokens: int

    def check(self, buckets: Buckets) -> None:
        """Raises ValueError, which names the bucket, if none holds it."""
        for what, needed in dataclasses.asdict(self).items():
            smallest(getattr(buckets, what), needed, what)


def smallest(sizes: Sequence[int], needed: int, what: str) -> int:
    """The smallest size of at least `needed`; without any a ValueError that names `what`."""
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ValueError(
            f"{what}: {needed} needed, but the largest bucket is {max(sizes)}; "
            f"raise data.{what} in the configuration"
        )
    return min(fitting)
