"""Batches: their order, their shapes, and what happens to samples that cannot be read."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from lens_jax.data import images
from lens_jax.data.buckets import Buckets
from lens_jax.data.evaluation_batches import Evaluation
from lens_jax.data.order import Order
from lens_jax.data.pipeline import Pipeline
from lens_jax.data.processor import Processor
from lens_jax.data.sample import Sample, SampleError
from lens_jax.data.sources import Joined
from lens_jax.data.sources.folder import Folder
from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.distribution.rows import Share
from lens_jax.preparation import checking
from tests.data.conftest import TINY

BUCKETS = Buckets(
    prompt_tokens=(64, 96), windows=(4, 9), canvas=((56, 56), (112, 140)), answer_tokens=(40,)
)


class Numbered:
    """Samples that name themselves: number i has the sentences `i a`, `i b`, and so on."""

    def __init__(self, count, sentences=3, bad=(), side=56):
        self.num_expressions = [sentences] * count
        self.bad, self.side = set(bad), side

    def __len__(self):
        return len(self.num_expressions)

    def __getitem__(self, index):
        if index in self.bad:
            raise SampleError(f"{index}.jpg: no such picture")
        texts = tuple(f"{index} {letter}" for letter in "abc"[: self.num_expressions[index]])
        image = np.full((self.side, self.side, 3), index, np.uint8)
        return Sample(image, texts, image[..., 0] > 0, np.arange(4.0), index, index, f"{index}.jpg")


def names(batch, tokenizer):
    """What the rows of a batch say they are."""
    texts = []
    for answer, length in zip(batch.targets.answer, batch.targets.answer_length, strict=True):
        text = tokenizer.decode(answer[:length])
        texts.append(text.removeprefix("<|object_ref_start|>").split(".")[0])
    return texts


def take(pipeline, count, tokenizer):
    return [names(batch, tokenizer) for batch in itertools.islice(pipeline, count)]


def rows_of(pipeline, count, tokenizer):
    return list(itertools.chain.from_iterable(take(pipeline, count, tokenizer)))


def make(processor, source=None, batch_size=4, seed=0, **options):
    source = Numbered(10) if source is None else source
    return Pipeline(source, processor, batch_size, seed, buckets=BUCKETS, **options)


def test_each_epoch_is_another_permutation(processor, tokenizer):
    rows = rows_of(make(processor, batch_size=5), 6, tokenizer)
    epochs = [[int(row.split()[0]) for row in rows[k : k + 10]] for k in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))
    assert len({row for row in rows}) > 15  # sentences vary over epochs
    assert take(make(processor, batch_size=5), 6, tokenizer) == [
        rows[k : k + 5] for k in range(0, 30, 5)
    ]
    assert take(make(processor, batch_size=5, seed=1), 2, tokenizer) != [rows[:5], rows[5:10]]


@pytest.mark.parametrize(("weights", "sizes"), [((2, 1), (5, 3)), ((0.37, 1, 0.2), (4, 30, 7))])
def test_parts_are_drawn_from_in_proportion(weights, sizes):
    """At any point, evenly; of a part every sample once before any comes again."""
    order = Order(sizes, 3, weights=weights)
    drawn = [order[number] for number in range(400)]
    ends = np.cumsum(sizes)
    parts = np.searchsorted(ends, drawn, side="right")
    counts = np.cumsum(parts[:, None] == np.arange(len(sizes)), axis=0)
    share = np.array(weights) / sum(weights)
    assert np.abs(counts - np.arange(1, 401)[:, None] * share).max() < len(sizes)
    for part, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = [i for i, p in zip(drawn, parts, strict=True) if p == part]
        epochs = [own[k : k + size] for k in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(end - size, end)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [order[number] for number in range(399, -1, -1)] == drawn[::-1]
    assert [Order(sizes, 4, weights=weights)[number] for number in range(400)] != drawn
    fixed = Order(sizes, 3, weights=weights, shuffle=False)
    first = [i for i in map(fixed.__getitem__, range(400)) if i < sizes[0]]
    assert first[: 2 * sizes[0]] == [*range(sizes[0])] * 2


def test_a_mixture_of_sources(processor, tokenizer):
    """Batches from two sources, resumed in the middle."""
    mixed = Joined([Numbered(6), Numbered(40)])
    rows = rows_of(make(processor, mixed, weights=(3, 1)), 8, tokenizer)
    order = Order((6, 40), 0, weights=(3, 1))
    indices = [order[number] for number in range(32)]
    assert [int(row.split()[0]) for row in rows] == [i if i < 6 else i - 6 for i in indices]
    assert sum(i < 6 for i in indices) == 24
    rest = rows_of(make(processor, mixed, weights=(3, 1), start=12), 5, tokenizer)
    assert rest == rows[12:]
    with pytest.raises(ValueError, match="a part of the training data is empty"):
        make(processor, Joined([Numbered(6), Numbered(0)]), weights=(1, 1))


def test_unshuffled_is_in_order(processor, tokenizer):
    rows = rows_of(make(processor, shuffle=False), 3, tokenizer)
    assert [int(row.split()[0]) for row in rows] == [*range(10), 0, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_position_resumes_on_any_number_of_processes(processor, tokenizer, threads):
    whole = make(processor, num_threads=threads)
    expected = take(whole, 6, tokenizer)
    assert whole.position == 24
    first = make(processor)
    assert take(first, 2, tokenizer) == expected[:2]
    shares = [
        make(processor, start=first.position, share=Share((i,), 2), num_threads=threads)
        for i in range(2)
    ]
    batches = [list(itertools.islice(share, 4)) for share in shares]
    for k, parts in enumerate(zip(*batches, strict=True)):
        joined = [name for part in parts for name in names(part, tokenizer)]
        assert joined == expected[2 + k]
        ids = np.concatenate([part.sample_id for part in parts])
        assert ids.tolist() == list(range(8 + 4 * k, 12 + 4 * k))
    with pytest.raises(ValueError, match="3 parts"):
        make(processor, share=Share((0,), 3))


def test_a_process_may_hold_any_parts_of_a_batch(processor, tokenizer):
    """As the devices of a mesh lie: the rows of each part in their order, parts in theirs."""
    whole = take(make(processor), 3, tokenizer)
    share = take(make(processor, share=Share((1, 3), 4)), 3, tokenizer)
    assert share == [[rows[1], rows[3]] for rows in whole]


def test_bad_samples_are_replaced_and_counted(processor, tokenizer):
    good = rows_of(make(processor), 10, tokenizer)
    pipeline = make(processor, Numbered(10, bad=[3, 7]))
    rows = rows_of(pipeline, 10, tokenizer)
    was_bad = [row.split()[0] in ("3", "7") for row in good]
    assert sum(was_bad) == pipeline.bad_samples == 8
    for row, before, bad in zip(rows, good, was_bad, strict=True):
        assert (row.split()[0] not in ("3", "7")) if bad else row == before
    assert rows == rows_of(make(processor, Numbered(10, bad=[3, 7])), 10, tokenizer)


def test_what_several_processes_hold_is_counted_once(processor):
    def count(*shares):
        made = [make(processor, Numbered(10, bad=[3, 7], side=120), share=s) for s in shares]
        for pipeline in made:
            list(itertools.islice(pipeline, 10))
        return [(pipeline.bad_samples, pipeline.shrunken_masks) for pipeline in made]

    first, second = count(Share((0,), 2), Share((0, 1), 2, repeated=(0,)))
    assert (first[0] + second[0], first[1] + second[1]) == (8, 40) and first[0] and second[0]
    assert count(Share(), Share(repeated=(0,))) == [(8, 40), (0, 0)]


def test_the_check_counts_what_training_counts(processor, tmp_path):
    """Of pictures of many sizes: masks larger than the canvas, and rows that fit no bucket."""
    sizes = [(56, 56), (112, 140), (112, 141), (113, 140), (140, 112), (168, 168), (30, 300)]
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (i, 0, 0)).save(tmp_path / f"{i}.png")
    boxes = [[1, 1, 9, 9]] * 4 + [None] * 3  # no target: an empty mask of the picture's size
    rows = [
        {"image": f"{i}.png", "expressions": [f"it {i}"], "box": box} for i, box in enumerate(boxes)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, report = Folder(tmp_path, "train"), checking.check(tmp_path)
    pipeline = make(processor, source, batch_size=7, shuffle=False)
    next(pipeline)
    assert pipeline.shrunken_masks == checking.shrunken(report, BUCKETS.largest_canvas) == 5
    needs = [processor.needs(v.size, v.row.expressions[0], v.box) for v in report.verdicts]
    assert needs == [processor.example(s, s.expressions[0]).needs for s in source]
    assert pipeline.bad_samples == 0
    small = dataclasses.replace(BUCKETS, windows=(4,))
    misfits = sum(n.windows > 4 for n in needs)
    pipeline = Pipeline(source, processor, 7, 0, buckets=small, shuffle=False)
    next(pipeline)
    assert pipeline.bad_samples == misfits > 0


def test_nothing_readable_is_an_error(processor):
    with pytest.raises(SampleError, match="no such picture"):
        next(make(processor, Numbered(5, bad=range(5))))
    with pytest.raises(ValueError, match="empty"):
        make(processor, Numbered(0))


def test_batches_take_the_smallest_bucket_that_holds_them(processor):
    def shapes(side):
        pipeline = make(processor, Numbered(4, side=side))
        batch = next(pipeline)
        sizes = (batch.prompts.tokens.shape[1], batch.prompts.patches.shape[1])
        return (*sizes, batch.targets.mask.shape[1:]), pipeline.shrunken_masks

    assert shapes(56) == ((64, 4, (56, 56)), 0)
    assert shapes(112) == ((64, 4, (112, 140)), 0)
    assert shapes(120) == ((64, 4, (112, 140)), 4)
    assert shapes(168) == ((96, 9, (112, 140)), 4)
    with pytest.raises(SampleError, match=r"data\.windows"):
        next(make(processor, Numbered(4, side=200)))
    with pytest.raises(ValueError, match="canvas"):
        Buckets(canvas=((640, 480), (480, 640)))


def test_a_batch_holds_what_the_processor_made(processor, tokenizer, shapes_dir):
    source = RefCoco(shapes_dir, "refcoco", "val")
    batch = next(make(processor, source, batch_size=6))
    prompts, targets = batch.prompts, batch.targets
    assert jax.tree.all(
        jax.tree.map(lambda a: a.dtype in (np.float32, np.int32, bool, np.uint8), batch)
    )
    refs = {text: i for i, ref in enumerate(source.refs) for text in ref.expressions}
    for row, name in enumerate(names(batch, tokenizer)):
        assert name in refs
        length = prompts.length[row]
        text = tokenizer.decode(prompts.tokens[row, :length])
        assert f"bounding box of the {name} in the image." in text
        index = prompts.image_index[row]
        slots = index[index >= 0]
        assert (
            sorted(slots) == np.flatnonzero(prompts.patch_mask[row].reshape(-1, 4).all(1)).tolist()
        )
        unit = prompts.patch_positions[row].reshape(-1, 4, 2)[slots, 0] // 2
        first = prompts.positions[row, 0, np.flatnonzero(index >= 0)[0]]
        np.testing.assert_array_equal(prompts.positions[row, 1:, index >= 0], unit + first)
        assert prompts.next_position[row] == prompts.positions[row, :, length - 1].max() + 1
        answer = tokenizer.decode(targets.answer[row, : targets.answer_length[row]])
        x0, y0, x1, y1 = targets.box[row].astype(int)
        assert answer.endswith(f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|><|im_end|>")
        ys, xs = np.nonzero(targets.mask[row])
        assert targets.mask_size[row].tolist() == [112, 112]
        np.testing.assert_allclose(
            [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], [x0, y0, x1, y1], atol=1
        )


def test_answer_and_truth_share_their_coordinates(tokenizer):
    """A picture of 180 x 90 is resized to 168 x 84; its sides are 1000 in the other scheme."""
    mask = np.zeros((90, 180), bool)
    image = np.zeros((90, 180, 3), np.uint8)
    sample = Sample(image, ("it",), mask, np.float32([18, 45, 90, 90]), 0, 0, "")
    expected = {"qwen2vl": (100, 500, 500, 1000), "qwen2p5vl": (17, 42, 84, 84)}
    for coordinates, box in expected.items():
        processor = Processor(tokenizer, sam_size=64, coordinates=coordinates)
        example = processor.example(sample, "it")
        assert example.box.tolist() == list(box)
        text = tokenizer.decode(example.answer)
        assert "<|box_start|>({},{}),({},{})<|box_end|>".format(*box) in text
        back = processor.box_to_pixels(box, (90, 180))
        np.testing.assert_allclose(back, sample.box, atol=0.6)
    with pytest.raises(ValueError, match="coordinates: 'pixels' is none of qwen2p5vl, qwen2vl"):
        Processor(tokenizer, sam_size=64, coordinates="pixels")


def test_evaluation_sees_every_expression_once(processor, tokenizer):
    source = Numbered(5)
    expected = [f"{i} {letter}" for i in range(5) for letter in "abc"]
    for count in (1, 2):
        seen = []
        shares = [
            Evaluation(source, processor, 4, buckets=BUCKETS, share=Share((i,), count))
            for i in range(count)
        ]
        assert {len(share) for share in shares} == {4} and shares[0].num_expressions == 15
        for parts in zip(*shares, strict=True):
            for part in parts:
                rows = list(itertools.compress(names(part.batch, tokenizer), part.valid))
                assert rows == [row.expression for row in part.rows]
                assert [expected[row.number] for row in part.rows] == rows
                assert len(part.valid) == 4 // count
                seen += rows
        assert seen == expected
    assert Evaluation(source, processor, 4, buckets=BUCKETS, limit=7).num_expressions == 7


def test_evaluation_limits_prompt_and_completion_together(processor):
    """All sentences of a sample have the room that the longest of their prompts leaves."""
    texts = {0: ("it", "the very one that is meant"), 1: ("a", "b"), 2: ("c" * 9, "d", "e e e")}

    class Worded(Numbered):
        def __getitem__(self, index):
            return dataclasses.replace(super().__getitem__(index), expressions=texts[index])

    source = Worded(3)
    source.num_expressions = [len(texts[i]) for i in range(3)]
    (batch,) = Evaluation(source, processor, 7, buckets=BUCKETS, max_length=60)
    lengths = batch.batch.prompts.length
    longest = [max(lengths[:2])] * 2 + [max(lengths[2:4])] * 2 + [max(lengths[4:])] * 3
    assert len(set(longest)) == 3
    np.testing.assert_array_equal(batch.limit, 60 - np.array(longest))
    (batch,) = Evaluation(source, processor, 7, buckets=BUCKETS, max_length=1)
    assert batch.limit.tolist() == [1] * 7
    (batch,) = Evaluation(source, processor, 7, buckets=BUCKETS)
    assert batch.limit is None


def test_pictures_are_prepared_as_their_data_set_says(processor):
    """ReasonSeg: a longest side first; SAM's picture by single pixels, not by areas."""
    image = np.zeros((112, 224, 3), np.uint8)
    image[:, ::8] = 255
    plain = Sample(image, ("it",), image[..., 0] > 0, None, 0, 0, "")
    other = dataclasses.replace(plain, longest_side=112, antialias=False)
    a, b = (processor.example(sample, "it").prompt for sample in (plain, other))
    assert a.coordinate_scale == (112, 224) and b.coordinate_scale == (56, 112)
    assert a.image_size == b.image_size == (112, 224)
    assert a.sam_pixels.shape == b.sam_pixels.shape
    assert a.sam_pixels.max() < 128 < b.sam_pixels.max()


def test_evaluation_does_not_pass_over_bad_samples(processor):
    with pytest.raises(SampleError, match=r"2\.jpg"):
        list(Evaluation(Numbered(5, bad=[2]), processor, 4, buckets=BUCKETS))


def test_evaluation_names_the_sample_that_no_bucket_holds_and_the_key(processor):
    small = dataclasses.replace(BUCKETS, prompt_tokens=(8,))
    said = r"0\.jpg, expression '0 a': .* raise data\.prompt_tokens"
    with pytest.raises(SampleError, match=said):
        list(Evaluation(Numbered(5), processor, 4, buckets=small))


def test_half_a_character_makes_a_bad_sample(processor):
    class Broken(Numbered):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            texts = tuple(f"\ud83d {text}" for text in sample.expressions) if index == 1 else None
            return dataclasses.replace(sample, expressions=texts or sample.expressions)

    with pytest.raises(SampleError, match=r"1\.jpg, expression '\\ud83d.*no valid Unicode"):
        list(Evaluation(Broken(5), processor, 4, buckets=BUCKETS, max_length=60))
    pipeline = Pipeline(Broken(5), processor, 5, 0, buckets=BUCKETS)
    next(pipeline)
    assert pipeline.bad_samples == 1


def test_processor_of_a_pretrained_checkpoint(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"lens_config\.json"):
        Processor.from_pretrained(tmp_path)
    config = {
        "mllm": {"vision_config": {"window_size": 56}},
        "sam": {"image_size": 64},
        "coordinates": "qwen2vl",
        "prompts": {"system": "Be brief.", "question": "Where is {question}?"},
    }
    (tmp_path / "lens_config.json").write_text(json.dumps(config))
    processor = Processor.from_pretrained(tmp_path)
    picture = np.zeros((100, 120, 3), np.uint8)
    batch = processor.prompts([picture, picture[:60]], ["it", "the other one"])
    assert batch.patches.shape == (2, 4, 16, 1176) and batch.sam_pixels.shape == (2, 64, 64, 3)
    text = processor.tokenizer.decode(batch.tokens[0, : batch.length[0]])
    assert "Where is it?" in text and "Be brief." in text
    np.testing.assert_allclose(
        processor.box_to_pixels((0, 250, 500, 1000), (100, 120)), [0, 25, 60, 100]
    )
    assert images.smart_resize(100, 120) == (112, 112)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"size": {"longest_edge": 500_000, "shortest_edge": 4000}}, (4000, 500_000)),
        ({"size": {"longest_edge": 9**9}, "max_pixels": 60_000}, (3136, 60_000)),
        ({"min_pixels": None, "max_pixels": None, "size": None}, (3136, 1_000_000)),
    ],
)
def test_processor_settings_in_every_form(tmp_path, nested, settings, limits):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path / name)
    config = {"mllm": {"vision_config": {}}, "sam": {"image_size": 64}}
    (tmp_path / "lens_config.json").write_text(json.dumps(config))
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | settings
    if nested:
        content, name = {"image_processor": settings}, "processor_config.json"
    else:
        content, name = settings, "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(content))
    processor = Processor.from_pretrained(tmp_path)
    assert (processor.min_pixels, processor.max_pixels) == limits
