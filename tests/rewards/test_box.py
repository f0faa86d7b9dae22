"""Numbers and boxes; where boxes are found is tested with the text rewards."""

import random
from functools import partial

import jax
import numpy as np
import pytest

from lens_jax.rewards.box import BoxReader, box_iou
from tests.rewards.texts import expected, same_number


@pytest.fixture(scope="module")
def read():
    """The boxes of texts, read in one piece each."""
    reader = BoxReader()

    def read(texts: list[str]):
        codes = reader.encode([text.encode().decode("latin-1") for text in texts])
        pieces = np.arange(len(texts))[:, None]
        return jax.device_get(jax.jit(partial(reader.find, codes))(pieces))

    return read


def test_numbers(read):
    rng = random.Random(0)
    numbers = ["0", "-0", "7", "-7", "000", "0.1", "-12.5", "1234567", "123456.7", "0.0001234567"]
    numbers += ["9" * 400, "0." + "0" * 50 + "1", "0" * 50 + "1.5", "1" + "0" * 38, "4" + "0" * 38]
    numbers += ["1234567.00000", "1234567000", "16777217", "33554435", "0.000000000000000000001"]
    for _ in range(3000):
        whole, fraction = ("".join(rng.choices("0123456789", k=rng.randint(a, 9))) for a in (1, 0))
        numbers.append(rng.choice(["", "-"]) + whole + ("." + fraction if fraction else ""))
    boxes, found = read([f"[{number},1,2,3]" for number in numbers])
    assert found.all()
    for ours, text in zip(boxes[:, 0], numbers, strict=True):
        assert same_number(ours, float(text)), (ours, text)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("(5,6,7,8) (1,2),(3,4) [1,2,3,4]", [1, 2, 3, 4]),  # the form counts before the place
        ("(1,2),(3,4) (5,6,7,8)", [5, 6, 7, 8]),
        ("(1,2),(3,4),(5,6)", [1, 2, 3, 4]),  # the first of two that overlap
        ("(0,(1,2),(3,4)", [1, 2, 3, 4]),
        ("(0,0),((1,2),(3,4)", [1, 2, 3, 4]),
        ("[1,[2,3,4,5]", [2, 3, 4, 5]),
        ("[9,9,9,9,9] [1,2,3,4]", [1, 2, 3, 4]),
        ("[1,2,3,4] [5,6,7,8]", [1, 2, 3, 4]),
        ("[ 1,\n2,\t3,  4 ]", [1, 2, 3, 4]),
        ("[1 ,2,3,4]", None),
        ("(1,2 ),(3,4)", None),
        ("(1,2) ,(3,4)", None),
        ("(1,2),  (3,4)", [1, 2, 3, 4]),
        ("[-1,-2.50,3,٤]", [-1, -2.5, 3, 4]),
        ("[--1,2,3,4]", None),
        ("[1.,2,3,4]", None),
        ("[1,2,3,4", None),
        ("[+1,2,3,4]", None),
        ("[1,2,3,4,]", None),
        ("", None),
    ],
)
def test_forms(read, text, box):
    boxes, found = read([text])
    assert expected(text)["box"] == box
    assert bool(found[0]) == (box is not None)
    assert boxes[0].tolist() == (box or [0, 0, 0, 0])


def test_tokens_become_short():
    """What is read on the device: of most tokens, one byte."""
    texts = ["hello", "中文", "é, 1.5", "    ", "</box>(", "a(b)[", "1,2)foo", "1,2)foo(3"]
    short = BoxReader.encode([text.encode().decode("latin-1") for text in texts])
    spelled = ["".join(chr(code) for code in row if code < 256) for row in short]
    assert spelled == ["x", "x", "x", " ", "x(", "x[", "1,2)x", "1,2)x(3"]


def official_iou(a, b):
    """None where the official code divides by zero."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union else None


def test_box_iou():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-20, 100, (2, 2000, 4)).astype(np.float32)
    a[:500], b[:500] = np.sort(a[:500].reshape(-1, 2, 2), 1).reshape(-1, 4), [10, 10, 60, 70]
    a[500:510] = b[500:510]
    a[510:520] = a[510:520, [0, 1, 0, 1]]
    b[510:515] = 0
    ours = np.asarray(box_iou(a, b))
    theirs = [official_iou(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert None in theirs
    np.testing.assert_allclose(ours, [iou or 0 for iou in theirs], rtol=1e-6)
    assert ours.dtype == np.float32


@pytest.mark.parametrize(
    "box", [[0, 0, np.inf, np.inf], [0, -np.inf, np.inf, 0], [0, 0, 3e38, 3e38]]
)
def test_boxes_without_end_score_nothing(box):
    assert box_iou(np.array(box, np.float32), np.array([0, 0, 10, 10], np.float32)) == 0
