"""Data sets: each source is a sequence of samples."""

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

from lens_jax.data.sample import Sample, Source
from lens_jax.data.sources.folder import Folder
from lens_jax.data.sources.grounding_suite import GroundingSuite
from lens_jax.data.sources.reason_seg import ReasonSeg
from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.data.sources.tfds_ref_coco import TfdsRefCoco


def open_source(
    dataset: str,
    split: str,
    data_dir: str | Path,
    *,
    evaluation: bool = False,
    official_masks: bool = False,
) -> Source:
    """A split of a data set by its name.

    Args:
        dataset: refcoco, refcoco+, refcocog, refclef, reason_seg, grounding_suite, tfds_ref_coco
            or folder, one's own.
        split: any for grounding_suite, which is one file.
        evaluation: ask as the official evaluation does, where that differs from training.
        official_masks: see `RefCoco` and `GroundingSuite`; the other data sets have no such masks.

    Raises:
        FileNotFoundError, ValueError: a file or the split is not there, cannot be read, or is
            empty.
    """
    if dataset == "reason_seg":
        source = ReasonSeg(data_dir, split, evaluation=evaluation)
    elif dataset == "grounding_suite":
        source = GroundingSuite(data_dir, evaluation=evaluation, official_masks=official_masks)
    elif dataset == "tfds_ref_coco":
        source = TfdsRefCoco(data_dir, split)
    elif dataset == "folder":
        source = Folder(data_dir, split)
    else:
        source = RefCoco(data_dir, dataset, split, official_masks=official_masks)
    if not any(source.num_expressions):
        raise ValueError(f"{data_dir}: split {split!r} of {dataset} is empty")
    return source


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


class Selected:
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, tuple(indices)

    @property
    def num_expressions(self) -> list[int]:
        counts = self.source.num_expressions
        return [counts[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]
