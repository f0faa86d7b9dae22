"""Every expression of a data set once, in order, in batches of static shapes."""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Bool, Int

from lens_jax.data.batching import Prompt, stack
from lens_jax.data.buckets import Buckets
from lens_jax.data.order import ProcessRows
from lens_jax.data.processor import Processor
from lens_jax.data.sample import Sample, SampleError, Source
from lens_jax.distribution.rows import Share
from lens_jax.models.inputs import Batch


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One expression to be evaluated: its number, its sample (original size), its text's scale."""

    number: int
    expression: str
    sample: Sample
    coordinate_scale: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EvaluationBatch:
    """A batch of which the rows with `valid` count; `rows` are those, in order.

    `limit` holds how many tokens each completion may have, None for no such limit.
    """

    batch: Batch
    valid: Bool[np.ndarray, "B"]
    limit: Int[np.ndarray, "B"] | None
    rows: tuple[EvaluationRow, ...]


class Evaluation:
    """All expressions of a source in order, each once, in batches; iterable any number of times.

    `len` is the number of batches, the same for every process; `num_expressions` counts over all
    of them. The last batch is filled up with copies of the last expression, which are not valid.
    A sample that cannot be read, or that no bucket holds, is a `SampleError`: scores over a part of
    the data are no scores.

    `max_length` limits prompt and completion together, as the official evaluation does: there all
    sentences of a sample are one batch, so the longest of their prompts counts for each of them.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        batch_size: int,
        *,
        buckets: Buckets,
        limit: int | None = None,
        max_length: int | None = None,
        reasoning: bool = False,
        share: Share = Share(),  # noqa: B008 (frozen)
        num_threads: int = 2,
        prefetch: int = 4,
    ):
        self.source, self.processor = source, processor
        self.buckets = buckets if share.whole else buckets.largest()
        self.max_length, self.reasoning = max_length, reasoning
        items = [(i, j) for i, n in enumerate(source.num_expressions) for j in range(n)]
        self._items = items[:limit]
        if not self._items:
            raise ValueError("the evaluation split is empty")
        self._rows = ProcessRows(batch_size, share)
        self._options = grain.ReadOptions(num_threads, prefetch)

    @property
    def num_expressions(self) -> int:
        return len(self._items)

    def expression(self, number: int) -> tuple[Sample, str]:
        """Expression `number` of the evaluation, with its sample."""
        item, sentence = self._items[number]
        sample = self.source[item]
        return sample, sample.expressions[sentence]

    def __len__(self) -> int:
        return -(-len(self._items) // self._rows.batch_size)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        return iter(
            grain.MapDataset.range(len(self)).map(self._batch).to_iter_dataset(self._options)
        )

    def _batch(self, index: int) -> EvaluationBatch:
        first = index * self._rows.local_size
        numbers = [self._rows.number(first + row) for row in range(self._rows.local_size)]
        valid = np.array([number < len(self._items) for number in numbers])
        samples: dict[int, Sample] = {}
        rows, examples, limits = [], [], []
        for number in numbers:
            item, sentence = self._items[min(number, len(self._items) - 1)]
            if item not in samples:
                samples[item] = self.source[item]
            sample, expression = samples[item], samples[item].expressions[sentence]
            try:
                example = self.processor.example(sample, expression, reasoning=self.reasoning)
                example.needs.check(self.buckets)
                limits.append(self._limit(sample, example.prompt))
            except ValueError as error:
                where = f"{sample.image_path}, expression {expression[:60]!r}"
                raise SampleError(f"{where}: {error}") from error
            examples.append(example)
            if number < len(self._items):
                scale = example.prompt.coordinate_scale
                rows.append(EvaluationRow(number, expression, sample, scale))
        limit = None if self.max_length is None else np.array(limits, np.int32)
        return EvaluationBatch(stack(examples, numbers, self.buckets), valid, limit, tuple(rows))

    def _limit(self, sample: Sample, prompt: Prompt) -> int | None:
        if self.max_length is None:
            return None
        image_tokens = int(np.sum(prompt.image_index >= 0))
        prompts = (
            self.processor.encoder.prompt(expression, image_tokens, self.reasoning)[0]
            for expression in sample.expressions
        )
        return max(1, self.max_length - max(map(len, prompts)))
