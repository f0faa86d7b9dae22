"""Coordinates in percent of the image's sides, told from pixels by how far they reach.

In a large image pixels reach beyond 100 sooner or later. That they do not in so many images is
too unlikely for chance: with one object an image, each further one of 640 x 480 makes it 31 times
less likely.
"""

import math
from collections.abc import Hashable
from typing import Literal

import numpy as np
from jaxtyping import Float

LARGE = 150  # pixels of an image's shorter side, from which on it tells percent from pixels
CHANCE = 1e-6  # below which pixels are ruled out
DOUBT = 1e-2  # below which they are doubted in a part of a data set
HIGHEST = 100.5  # of percent, whose sums are rounded
Coordinates = Literal["auto", "pixels"]


class Reach:
    """How far coordinates reach that were written together, in one file or folder."""

    def __init__(self):
        self.largest = np.zeros(2)  # x, y
        self._chances: dict[Hashable, float] = {}

    def add(self, picture: Hashable, size: tuple[int, int], corners: Float[np.ndarray, "N 2"]):
        """Adds corners (x, y) in an image of `size` (height, width); small ones tell little."""
        if not corners.size or (min(size) < LARGE and corners.max() <= HIGHEST):
            return
        self.largest = np.maximum(self.largest, corners.max(0))
        if min(size) >= LARGE:
            self._chances[picture] = math.log(100 / size[0]) + math.log(100 / size[1])

    @property
    def chance(self) -> float:
        """That pixels reach no farther than 100 in these images."""
        return math.exp(sum(self._chances.values()))

    @property
    def may_be_percent(self) -> bool:
        return bool(self._chances) and 50 < self.largest.max() <= HIGHEST

    @property
    def is_percent(self) -> bool:
        """Whether chance is no explanation."""
        return self.may_be_percent and self.largest.min() > 50 and self.chance < CHANCE

    def __str__(self) -> str:
        return f"no coordinate in {len(self._chances)} large pictures is over 100"
