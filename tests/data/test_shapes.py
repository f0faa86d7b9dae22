"""The generated scenes: unambiguous expressions in the promised tiers, held out as promised."""

import collections

import numpy as np
import pytest

from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.preparation import shapes


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(7)
    return [shapes.random_scene(rng) for _ in range(300)]


def _meant(scene: shapes.Scene, text: str) -> list[int]:
    """The objects a sentence can mean, read from its words and the visible boxes alone."""
    for relation, (axis, sign) in shapes.RELATIONS.items():
        if f" {relation} the " in text:
            head, tail = text.split(f" {relation} ")
            (anchor,) = _meant(scene, tail)
            place = [_center(o)[axis] for o in scene.objects]
            return [i for i in _meant(scene, head) if sign * (place[i] - place[anchor]) > 0]
    words = text.split()
    found = [
        i
        for i, o in enumerate(scene.objects)
        if o.color in words
        and o.shape in words
        and (not {*shapes.SIZES} & {*words} or o.size in words)
    ]
    for word, (axis, sign, _) in shapes.PLACES.items():
        if word in words:
            return [max(found, key=lambda i: sign * _center(scene.objects[i])[axis])]
    return found


def _center(o: shapes.ShapeObject) -> np.ndarray:
    return (o.box[:2] + o.box[2:]) / 2


def test_every_expression_means_exactly_its_object(scenes):
    for scene in scenes:
        for i, o in enumerate(scene.objects):
            for expression in o.expressions:
                assert _meant(scene, expression.text) == [i], expression


def test_words_of_a_tier_are_needed(scenes):
    for scene in scenes:
        kinds = collections.Counter((o.color, o.shape) for o in scene.objects)
        for o in scene.objects:
            for expression in o.expressions:
                assert (kinds[o.color, o.shape] == 1) == (expression.tier == 1)


def test_boxes_and_masks_agree_and_objects_are_visible(scenes):
    for scene in scenes:
        assert scene.image.shape == (112, 112, 3) and scene.image.dtype == np.uint8
        assert 2 <= len(scene.objects) <= 6
        assert sum(o.mask.astype(int) for o in scene.objects).max() == 1
        for o in scene.objects:
            ys, xs = np.nonzero(o.mask)
            assert o.box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            full = (o.box[2:] - o.box[:2]).max() ** 2
            assert o.mask.sum() > 0.35 * full


def test_tiers_and_held_out_share(scenes):
    tiers, held_out, count = np.zeros(4), 0, 0
    for scene in scenes:
        for o in scene.objects:
            for expression in o.expressions:
                tiers[expression.tier] += 1 / len(o.expressions)
                count += 1
                held_out += shapes.is_held_out(expression)
    share = tiers / tiers.sum()
    assert 0.45 < share[1] < 0.65 and 0.12 < share[2] < 0.25 and 0.2 < share[3] < 0.35
    assert 0.03 < held_out / count < 0.2


def test_same_generator_same_scene():
    a, b = (shapes.random_scene(np.random.default_rng(5)) for _ in range(2))
    assert (a.image == b.image).all()
    assert [o.expressions for o in a.objects] == [o.expressions for o in b.objects]


def test_sentences_are_listed(scenes):
    listed = set(shapes.all_sentences())
    for scene in scenes:
        for o in scene.objects:
            assert {expression.text for expression in o.expressions} <= listed


def test_training_has_pictures_of_other_proportions(shapes_dir):
    """One in three has a shape of its own, and masks of its size; held-out splits have none."""
    sizes = {}
    for split in ("train", "val"):
        source = RefCoco(shapes_dir, "refcoco", split)
        samples = [source[i] for i in range(len(source))]
        assert all(s.mask.shape == s.image.shape[:2] for s in samples)
        sizes[split] = [s.image.shape[:2] for s in samples]
    assert set(sizes["val"]) == {(112, 112)}
    varied = [size for size in sizes["train"] if size != (112, 112)]
    assert 0.1 < len(varied) / len(sizes["train"]) < 0.4
    assert all(max(size) == 112 and min(size) >= 64 for size in varied)
    assert {size[0] < size[1] for size in varied} == {True, False}
