"""Which sample comes when, and which rows of a batch a process holds."""

import fractions
import itertools
import math
from collections.abc import Sequence

import grain
import numpy as np

from lens_jax.distribution.rows import Share


class Order:
    """Which sample comes when: an endless sequence, and a pure function of the seed.

    Args:
        sizes: samples of each part; a part's indices go on where the last one's end.
        weights: the share of each part, up to a factor.
        shuffle: every epoch of a part in an order of its own, else in the part's.
    """

    def __init__(
        self, sizes: Sequence[int], seed: int, *, weights: Sequence[float], shuffle: bool = True
    ):
        if not all(sizes):
            raise ValueError("a part of the training data is empty")
        starts = np.cumsum([0, *sizes]).tolist()
        parts = [grain.MapDataset.range(a, b) for a, b in itertools.pairwise(starts)]
        self._parts = [(p.shuffle(seed=seed) if shuffle else p).repeat() for p in parts]
        exact = [fractions.Fraction(weight) for weight in weights]
        rest = list(itertools.accumulate(reversed(exact)))[::-1]
        self._shares = [weight / total for weight, total in zip(exact, rest, strict=True)]

    def __getitem__(self, number: int) -> int:
        # Of n samples a part with share s takes floor(n s), the parts after it what is left.
        for part, share in zip(self._parts, self._shares, strict=True):
            taken = math.floor(number * share)
            if math.floor((number + 1) * share) > taken:
                return part[taken]
            number -= taken
        raise AssertionError("the last share is 1")


class ProcessRows:
    """Which global sample numbers a process holds: of every batch, its share."""

    def __init__(self, batch_size: int, share: Share):
        if batch_size % share.count:
            raise ValueError(f"a batch of {batch_size} does not divide over {share.count} parts")
        self.batch_size, self.parts = batch_size, share.parts
        self.part_size = batch_size // share.count
        self.local_size = self.part_size * len(share.parts)
        # Of the rows of a batch, those that are counted here.
        self.counted = np.repeat([p not in share.repeated for p in share.parts], self.part_size)

    def number(self, local: int) -> int:
        batch, row = divmod(local, self.local_size)
        part, place = divmod(row, self.part_size)
        return batch * self.batch_size + self.parts[part] * self.part_size + place
