"""From samples to batches of static shapes, in an order that is a pure function of the seed.

Sample number i of a run is the same whatever the number of processes, threads and restarts: its
place in the epoch's permutation, its sentence and, should it be unreadable, its replacement depend
on (seed, i) alone. The position of a run in its data is therefore one integer.
"""

import dataclasses
import fractions
import itertools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from lens_jax.data import images, processor_files, prompts
from lens_jax.data.sample import Sample, SampleError, Source, to_rgb
from lens_jax.distribution.rows import Share
from lens_jax.files import blaming
from lens_jax.models.inputs import Batch, Prompts, Targets

log = logging.getLogger("lens_jax")

# Samples tried in place of an unreadable one before the data set is given up: so many that
# `data.max_bad`, even of 1, is what ends a run of which half can be read.
ATTEMPTS = 64


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
class Prompt:
    """One prompt before it is padded to a bucket; a row of `Prompts`, with its sizes."""

    patches: Float[np.ndarray, "W S C"]
    patch_positions: Int[np.ndarray, "W S 2"]
    patch_mask: Bool[np.ndarray, "W S"]
    tokens: Int[np.ndarray, "P"]
    image_index: Int[np.ndarray, "P"]
    positions: Int[np.ndarray, "3 P"]
    next_position: int
    sam_pixels: UInt8[np.ndarray, "A A 3"]
    image_size: tuple[int, int]  # (height, width) of the picture as given
    coordinate_scale: tuple[int, int]  # what the text's (y, x) run to


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an example takes of the buckets of the same names."""

    windows: int
    prompt_tokens: int
    answer_tokens: int

    def check(self, buckets: Buckets) -> None:
        """Raises ValueError, which names the bucket, if none holds it."""
        for what, needed in dataclasses.asdict(self).items():
            _bucket(getattr(buckets, what), needed, what)


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with its truth, before padding."""

    prompt: Prompt
    box: Float[np.ndarray, "4"]  # as the text writes it; zeros if the sample has none
    mask: Bool[np.ndarray, "H W"]
    answer: Int[np.ndarray, "T"]

    @property
    def needs(self) -> Needs:
        prompt = self.prompt
        return Needs(len(prompt.patches), len(prompt.tokens), len(self.answer))


class Processor:
    """Everything between a picture with an expression and what the model is fed."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        sam_size: int,
        window_size: int = 112,
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
        self.encoder = prompts.PromptEncoder(tokenizer, templates)
        self.sam_size = sam_size
        self.window_units = window_size // images.FACTOR
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
                window_size=vision.get("window_size") or 112,
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
        """A warning about a picture of (height, width) if the model does less well on its kind."""
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
        """Prepares one picture with one expression.

        Args:
            reasoning: ask for a line of thought before the answer.
            longest_side: resize the language model's picture to this longest side first.
            antialias: of SAM's picture.

        Raises:
            ValueError: the picture is more than 200 times as long as wide.
        """
        if isinstance(image, Image.Image):
            image = to_rgb(image)
        image_size = (image.shape[0], image.shape[1])
        picture = image
        if longest_side is not None:
            picture = images.resize(image, images.longest_side(*image_size, longest_side))
        size, (source, patch_positions, slots) = self._layout(picture.shape[:2])
        patches, grid = images.patchify(images.resize(picture, size), self.mean, self.std)
        arranged, patch_mask = images.arrange_windows(patches, source)
        units = (grid[0] // 2, grid[1] // 2)
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
        """`Example.needs` of a picture of this (height, width), without its pixels."""
        picture = image_size
        if longest_side is not None:
            picture = images.longest_side(*image_size, longest_side)
        size, (source, _, slots) = self._layout(picture)
        tokens, _ = self.encoder.prompt(expression, len(slots), reasoning)
        scale = prompts.coordinate_scale(size, self.coordinates)
        _, answer = self._answer(expression, box, image_size, scale)
        return Needs(len(source), len(tokens), len(answer))

    def _layout(self, picture: tuple[int, ...]) -> tuple[tuple[int, int], tuple[np.ndarray, ...]]:
        """The size that the language model's picture is resized to, and its `window_layout`."""
        size = images.smart_resize(*picture, self.min_pixels, self.max_pixels)
        grid = (size[0] * 2 // images.FACTOR, size[1] * 2 // images.FACTOR)
        return size, images.window_layout(grid, self.window_units)

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
        """A box that the text writes, as xyxy pixels of the original picture (height, width)."""
        resized = images.smart_resize(*image_size, self.min_pixels, self.max_pixels)
        scale = prompts.coordinate_scale(resized, self.coordinates)
        return prompts.box_to_pixels(box, image_size, scale)


def _bucket(sizes: Sequence[int], needed: int, what: str) -> int:
    fitting = [size for size in sizes if size >= needed]
    if not fitting:
        raise ValueError(
            f"{what}: {needed} needed, but the largest bucket is {max(sizes)}; "
            f"raise data.{what} in the configuration"
        )
    return min(fitting)


def stack_prompts(rows: Sequence[Prompt], buckets: Buckets | None = None) -> Prompts:
    """Pads prompts to one static shape, tokens on the right, windows at the end.

    Raises:
        ValueError: a row is larger than the largest bucket.
    """
    windows = max(len(row.patches) for row in rows)
    length = max(len(row.tokens) for row in rows)
    if buckets is not None:
        windows = _bucket(buckets.windows, windows, "windows")
        length = _bucket(buckets.prompt_tokens, length, "prompt_tokens")
    count, (slots, channels) = len(rows), rows[0].patches.shape[1:]
    side = rows[0].sam_pixels.shape[0]
    batch = Prompts(
        patches=np.zeros((count, windows, slots, channels), np.float32),
        patch_positions=np.zeros((count, windows, slots, 2), np.int32),
        patch_mask=np.zeros((count, windows, slots), bool),
        tokens=np.zeros((count, length), np.int32),
        image_index=np.full((count, length), -1, np.int32),
        length=np.array([len(row.tokens) for row in rows], np.int32),
        positions=np.zeros((count, 3, length), np.int32),
        next_position=np.array([row.next_position for row in rows], np.int32),
        sam_pixels=np.empty((count, side, side, 3), np.uint8),
    )
    for i, row in enumerate(rows):
        w, p = len(row.patches), len(row.tokens)
        batch.patches[i, :w] = row.patches
        batch.patch_positions[i, :w] = row.patch_positions
        batch.patch_mask[i, :w] = row.patch_mask
        batch.tokens[i, :p] = row.tokens
        batch.image_index[i, :p] = row.image_index
        batch.positions[i, :, :p] = row.positions
        batch.sam_pixels[i] = row.sam_pixels
    return batch


def stack_targets(rows: Sequence[Example], buckets: Buckets) -> Targets:
    """Pads truths to one static shape; a mask larger than every canvas is shrunken to the largest.

    Raises:
        ValueError: an answer is longer than the largest bucket.
    """
    masks = [images.fit_mask(row.mask, buckets.largest_canvas) for row in rows]
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))
    canvas = min(c for c in buckets.canvas if c[0] >= height and c[1] >= width)
    longest = max(len(row.answer) for row in rows)
    length = _bucket(buckets.answer_tokens, longest, "answer_tokens")
    targets = Targets(
        box=np.stack([row.box for row in rows]),
        mask=np.zeros((len(rows), *canvas), bool),
        mask_size=np.array([mask.shape for mask in masks], np.int32),
        answer=np.zeros((len(rows), length), np.int32),
        answer_length=np.array([len(row.answer) for row in rows], np.int32),
    )
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        targets.mask[i, : mask.shape[0], : mask.shape[1]] = mask
        targets.answer[i, : len(row.answer)] = row.answer
    return targets


def stack(rows: Sequence[Example], sample_ids: Sequence[int], buckets: Buckets) -> Batch:
    """A batch of one static shape."""
    return Batch(
        prompts=stack_prompts([row.prompt for row in rows], buckets),
        targets=stack_targets(rows, buckets),
        sample_id=np.array(sample_ids, np.int32),
    )


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


class _Rows:
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
        self._rows = rows = _Rows(batch_size, share)
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
        self._rows = _Rows(batch_size, share)
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
