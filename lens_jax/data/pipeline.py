"""From samples to batches of static shapes, in an order that is a pure function of the seed.

Sample number i of a run is the same whatever the number of processes, threads and restarts: its
place in the epoch's permutation, its sentence and, should it be unreadable, its replacement depend
on (seed, i) alone. The position of a run in its data is therefore one integer.
"""

import logging
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from lens_jax.data.batching import Example, stack
from lens_jax.data.buckets import Buckets
from lens_jax.data.order import Order, ProcessRows
from lens_jax.data.processor import Processor
from lens_jax.data.sample import SampleError, Source
from lens_jax.distribution.rows import Share
from lens_jax.models.inputs import Batch

log = logging.getLogger("lens_jax")

# Samples tried in place of an unreadable one before the data set is given up: so many that
# `data.max_bad`, even of 1, is what ends a run of which half can be read.
ATTEMPTS = 64


class Pipeline:
    """Endless training batches, this process's share of each; an iterator.

    `position` is the number of the next sample: hand it to another pipeline's `start` to go on from
    there, with any number of processes. `bad_samples` and `shrunken_masks` count, among the batches
    handed out since `start`, the samples of this process that were replaced because they could not
    be read or did not fit the largest bucket, and the masks made smaller to fit the canvas; what
    several processes hold, the first of them counts.

    A `Joined` source with `weights` is drawn from in their proportion, exactly and evenly, each
    part by its own permutations; otherwise every sample comes once before any comes again.

    A process that holds a part of each batch pads it to the largest buckets, because it does not
    see the sizes of the others' rows.

    Args:
        batch_size: rows of the global batch.
        seed: of the order and of the sentences, in 0..2**32 - 1.
        weights: how often each part of the source is drawn from, up to a factor.
        shuffle: False keeps the source's order, as a curriculum asks for.
        start: number of the first sample.
        share: of each batch, what this process reads.
        num_threads: batches prepared at the same time.
        prefetch: batches kept ready.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        batch_size: int,
        seed: int,
        *,
        buckets: Buckets,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        reasoning: bool = False,
        start: int = 0,
        share: Share = Share(),  # noqa: B008 (frozen)
        num_threads: int = 2,
        prefetch: int = 2,
    ):
        if len(source) == 0:
            raise ValueError("the training split is empty")
        self.source, self.processor, self.seed = source, processor, seed
        self.buckets = buckets if share.whole else buckets.largest()
        self.reasoning = reasoning
        self.batch_size = batch_size
        self.position = start
        self.bad_samples = 0
        self.shrunken_masks = 0
        sizes = [len(source)] if weights is None else [len(part) for part in source.sources]
        self._order = Order(sizes, seed, weights=weights or (1.0,), shuffle=shuffle)
        self._reported: set[int] = set()
        self._rows = rows = ProcessRows(batch_size, share)
        batches = (
            grain.MapDataset.range(sys.maxsize // batch_size - start)
            .map(lambda local: self._example(start + rows.number(local)))
            .batch(rows.local_size, batch_fn=self._stack)
            .to_iter_dataset(grain.ReadOptions(num_threads, prefetch))
        )
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, bad, shrunken = next(self._batches)
        self.position += self.batch_size
        self.bad_samples += bad
        self.shrunken_masks += shrunken
        return batch

    def _example(self, number: int) -> tuple[int, Example, bool]:
        """Sample `number` of the run, and whether it stands in for one that is bad."""
        index = self._order[number]
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng((self.seed, number, attempt))
            if attempt:
                index = int(rng.integers(len(self.source)))
            try:
                sample = self.source[index]
                expression = sample.expressions[int(rng.integers(len(sample.expressions)))]
                example = self.processor.example(sample, expression, reasoning=self.reasoning)
                example.needs.check(self.buckets)
                return number, example, attempt > 0
            except (SampleError, ValueError) as error:
                last = error
                if index not in self._reported:
                    self._reported.add(index)
                    log.warning("sample %d is left out: %s", index, error)
        raise SampleError(
            f"{ATTEMPTS} samples in a row cannot be used; the last one: {last}"
        ) from last

    def _stack(self, rows: Sequence[tuple[int, Example, bool]]) -> tuple[Batch, int, int]:
        numbers, examples, bad = zip(*rows, strict=True)
        batch = stack(examples, numbers, self.buckets)
        shrunken = [self.buckets.shrink(example.mask.shape) for example in examples]
        counted = self._rows.counted
        return batch, int(np.sum(counted & bad)), int(np.sum(counted & shrunken))
