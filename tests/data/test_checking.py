"""The check of a data set of one's own: what it finds, that its counts add up, and its page."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from lens_jax.preparation.checking import check, page

BOX = [4, 3, 20, 15]


def write(directory, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (directory / "manifest.jsonl").write_text("\n".join(lines), encoding="utf-8")


def row(image="a.png", *sentences, **keys):
    return {"image": image, "expressions": list(sentences) or [f"it in {image}"], **keys}


@pytest.fixture
def pictures(tmp_path):
    """a.png, b.png and c.png, which differ, and copy.png, which is a.png under another name."""
    for i, name in enumerate("abc"):
        Image.new("RGB", (40, 30), (40 + 50 * i, 120, 90)).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    mask = np.zeros((30, 40), np.uint8)
    mask[3:15, 4:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def kinds(verdict):
    return [note.kind for note in verdict.notes]


def test_a_good_data_set_has_no_remarks(pictures):
    write(
        pictures, row(box=BOX), row("b.png", mask="mask.png", split="val"), row("c.png", box=None)
    )
    report = check(pictures)
    assert report.unusable == 0 and not report.errors() and not report.notes()
    assert [list(c.values()) for c in report.counts()] == [
        ["train", 2, 2, 0, 1, 2, 2],
        ["val", 1, 1, 0, 0, 1, 1],
        ["all", 3, 3, 0, 1, 3, 3],
    ]


def test_counts_add_up(pictures):
    write(
        pictures,
        row(box=BOX),
        "{",
        row("missing.png", box=BOX, split="val"),
        row("b.png", "x", "y", mask="mask.png", split="val"),
        row("c.png", mask="none.png"),
        row("c.png", mask="none.png", split="val"),
        "",
        "7",
    )
    report = check(pictures)
    *splits, total = report.counts()
    assert [c["split"] for c in splits] == ["?", "train", "val"]
    for key in ("rows", "usable", "unusable", "no target", "samples"):
        assert total[key] == sum(c[key] for c in splits)
    assert total["rows"] == 7 and total["usable"] == 2 and report.unusable == 5
    assert all(c["rows"] == c["usable"] + c["unusable"] for c in report.counts())
    assert sum(count for _, count, _ in report.errors()) == 5
    first = {kind: (count, text) for kind, count, text in report.errors()}
    assert first["not JSON"][0] == 2 and "line 2" in first["not JSON"][1]
    assert first["no mask file"][0] == 2 and "none.png" in first["no mask file"][1]
    assert first["unreadable picture"][0] == 1


def test_what_is_to_be_looked_at(pictures):
    polygon = [[-9, 3, 20, 3, 20, 15]]
    write(
        pictures,
        row("a.png", "It", "it "),
        row("a.png", "the cup", box=BOX),
        row("a.png", "The  Cup", box=BOX),
        row("copy.png", "the cup", box=[0, 0, 9, 9]),
        row("copy.png", "other", box=BOX, split="val"),
        row("b.png", "one", mask="mask.png", box=[4, 3, 20, 9]),
        row("b.png", "two", polygons=polygon),
        row("c.png", "three", box=BOX, colour="red", masks=3),
        row("c.png", "three", box=BOX, split="val"),
    )
    report = check(pictures)
    found = [kinds(verdict) for verdict in report.verdicts]
    assert report.verdicts[0].error.kind == "no mask, no box"
    assert found[1] == ["split leakage"]
    assert found[2] == ["split leakage", "duplicated"]
    assert found[3] == ["split leakage", "one sentence, two objects"]
    assert found[4] == ["split leakage"]
    assert found[5] == ["box against mask"]
    assert found[6] == ["outside the picture"]
    assert found[7] == ["keys not read", "split leakage"]
    assert found[8] == ["split leakage"]
    assert "IoU of 0.50" in report.verdicts[5].notes[0].text
    assert "by 9.0 pixels" in report.verdicts[6].notes[0].text
    assert report.verdicts[7].notes[0].text.endswith("line 8: colour, masks")
    assert "copy.png is in val, and in train (line 2)" in report.verdicts[4].notes[0].text
    assert dict((kind, count) for kind, count, _ in report.notes())["split leakage"] == 6


def test_doubtful_masks_are_to_be_looked_at(pictures):
    grey = np.zeros((30, 40), np.uint8)
    grey[3:15, 4:20] = 255
    soft = Image.fromarray(np.kron(grey, np.ones((4, 4), np.uint8)))
    several = grey // 255
    several[8:15] *= 2
    masks = {
        "inverted": Image.fromarray(255 - grey),
        "whole": Image.new("L", (40, 30), 1),
        "soft": soft.resize((40, 30), Image.Resampling.BICUBIC),
        "several": Image.fromarray(several),
    }
    for name, mask in masks.items():
        mask.save(pictures / f"{name}.png")
    whole = [[0, 0, 40, 0, 40, 30, 0, 30]]
    write(
        pictures,
        *(row("a.png", f"the {name}", mask=f"{name}.png") for name in masks),
        row("b.png", polygons=whole),
        row("c.png", box=BOX),
    )
    report = check(pictures)
    assert report.unusable == 0
    assert [kinds(verdict) for verdict in report.verdicts] == [
        ["all corners"],
        ["whole picture"],
        ["soft edge"],
        ["several values"],
        ["whole picture"],
        [],
    ]
    assert "line 1: mask covers all four corners" in report.verdicts[0].notes[0].text
    assert "soft.png: 7 values: from half" in report.verdicts[2].notes[0].text
    sizes = [v.target for v in report.verdicts[2:4]]
    assert sizes[0] == sizes[1]  # a soft edge is no part of the object


def test_coordinates_that_may_be_percent(pictures):
    Image.new("RGB", (640, 480)).save(pictures / "large.png")
    percent, pixels = [20, 30, 60, 80], [200, 30, 260, 80]
    large = row("large.png", "that", box=percent)
    write(pictures, row(box=BOX), large, row("large.png", "it", polygons=[[1, 1, 9, 1, 9, 9]]))
    assert [kinds(v) for v in check(pictures).verdicts] == [[], *[["perhaps percent"]] * 2]
    write(pictures, row(box=BOX), large, row("large.png", "it", box=pixels))
    assert not check(pictures).notes()


def test_percent_is_refused_by_split_and_by_folder(pictures):
    """However many rows in pixels there are beside."""
    (pictures / "p").mkdir()
    for i in range(5):
        Image.new("RGB", (640, 480), (i, 0, 0)).save(pictures / "p" / f"{i}.png")
    (pictures / "q.png").write_bytes((pictures / "p" / "4.png").read_bytes())
    percent = [row(f"p/{i}.png", box=[20, 30, 60, 100.00000000000001]) for i in range(5)]
    pixels = row("q.png", box=[200, 30, 260, 80])
    for rows in (
        [*percent, pixels],  # a folder of its own
        [r | {"split": "val"} for r in percent] + [row("p/4.png", "other", box=pixels["box"])],
    ):
        write(pictures, *rows)
        report = check(pictures)
        assert [v.error is not None for v in report.verdicts] == [True] * 5 + [False]
        assert "no coordinate in 5 large pictures is over 100" in report.errors()[0][2]
        assert "--coordinates pixels" in report.errors()[0][2]
        report = check(pictures, coordinates="pixels")
        assert not report.unusable and "percent" not in str(report.notes())
    low = [row(f"p/{i}.png", box=[20, 30, 60, 45]) for i in range(5)]  # not in both directions
    write(pictures, *low)
    assert [kinds(v) for v in check(pictures).verdicts] == [["perhaps percent"]] * 5


def test_fractions_beside_pixels(pictures):
    """Box and polygons are tested apart."""
    part = [[4, 3, 20, 3, 20, 15, 4, 15]]
    fractions = [[v / 40 for v in part[0]]]
    write(
        pictures,
        row(polygons=fractions, box=[0, 0, 20, 15]),
        row(polygons=part, box=[0.1, 0.1, 0.5, 0.5]),
        row(polygons=[[0, 0, 1, 0, 1, 1, 0, 1]], box=[0, 0, 40, 30]),
    )
    assert [v.error.kind for v in check(pictures).verdicts] == ["fractions"] * 3


def test_the_page_shows_masks_and_escapes_text(pictures):
    write(
        pictures,
        row("a.png", "<script>alert(1)</script>", mask="mask.png"),
        row("b.png", "a", "b", box=None),
        row("none<b>.png", box=BOX),
        row("c.png", "doubled", "doubled", box=BOX),
    )
    text = page(check(pictures), thumbnails=10)
    assert "<script>" not in text and "&lt;script&gt;" in text and "none&lt;b&gt;.png" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "(no target)" in text and "duplicated" in text
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(images) == 3
    shown = {}
    for image in images:
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), int)
        assert picture.shape == (195, 260, 3)  # enlarged, so that thin lines are thin
        shown[int(picture[160, 200, 0]) // 50] = picture
    tinted = shown[0][58, 78] - shown[0][160, 200]
    assert tinted[0] < -10 and tinted[2] > 50  # the mask of a.png
    assert np.abs(shown[1] - shown[1][160, 200]).max() < 12  # no target
    assert page(check(pictures), thumbnails=1).count("data:image") == 1
    assert page(check(pictures), thumbnails=0).count("data:image") == 0


def test_the_page_shows_an_object_at_the_edge_of_a_large_picture(pictures):
    Image.new("RGB", (1600, 1200)).save(pictures / "large.png")
    boxes = [1597, 100, 1600, 400], [100, 1198, 400, 1200]
    write(pictures, *(row("large.png", f"the {box}", box=box) for box in boxes))
    assert page(check(pictures), thumbnails=2).count("data:image") == 2
