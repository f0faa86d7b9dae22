"""Data sets: each source is a sequence of samples."""

import bisect
import itertools
from collections.abc import Sequence

from lens_jax.data.sample import Sample, Source


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = tuple(sources)
        self._ends = list(itertools.accumulate(len(source) for source in self.sources))

    @property
    def num_expressions(self) -> list[int]:
        return [n for source in self.sources for n in source.num_expressions]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        return self.sources[part][index - (self._ends[part - 1] if part else 0)]
