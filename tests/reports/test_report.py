"""The report of a run directory, and the pictures in it."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from lens_jax.reports import charts, drawing, pages, report
from lens_jax.reports.drawing import Answer, add_panel
from lens_jax.training.metrics import EVALUATIONS, StageLog

NASTY = '<script>alert("1")</script> & „Zitat“ 红'


@pytest.fixture
def scene():
    image = np.full((60, 80, 3), 90, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[20:40, 30:50] = True
    return image, np.array([30.0, 20, 50, 40], np.float32), mask


def answer(scene, title="before", completion="a box", box=(10, 10, 60, 50)):
    _, _, mask = scene
    box = None if box is None else np.array(box, np.float32)
    return Answer(title, completion, box, np.roll(mask, 5, 1), 0.25, 0.5)


@pytest.fixture
def run(tmp_path, scene):
    image, box, mask = scene
    run_dir = tmp_path / "short <run>"
    with StageLog(run_dir, "alignment", steps=40) as log:
        for step in range(1, 41):
            log.write(step, {"loss": 2.0 / step, "mask_iou": step / 50, "grad_norm": float("nan")})
    with StageLog(run_dir, "grpo", steps=500) as log:
        for step in range(1, 501):
            log.write(
                step, {"loss": 0.5, "reward": step / 100, "reward/box": 0.3, "reward/mine": 0.1}
            )
    scores = {"samples": 100, "giou": 0.25, "ciou": 0.2, "box_iou": 0.3, "seconds": 2.0}
    after = scores | {"giou": 0.75, "box_iou": None, "ciou": 0.1}
    (run_dir / "evaluation.json").write_text(json.dumps({"before": scores, "after_grpo": after}))
    (run_dir / "config.yaml").write_text(f"run_dir: '{NASTY}'\n")
    for title in ("before", EVALUATIONS["after_grpo"]):
        drawn = answer(scene, title, f"{title} {NASTY}")
        add_panel(run_dir / "samples" / "00.png", image, NASTY, box, mask, drawn)
    return run_dir


class Page(html.parser.HTMLParser):
    """Tags (checked to nest), their attributes, and the text."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + " "

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_stands_alone_and_escapes_what_it_shows(run):
    text = report.write(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("script") == [] and page.all("link") == []
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "url(" not in text
    assert f"after GRPO (stage 2) {NASTY}" in page.text  # the completion, as text
    assert f"“{NASTY}”" in page.text  # the expression
    assert f"run_dir: '{NASTY}'" in page.text  # the configuration
    assert "short <run>" in page.text
    assert "width=device-width" in page.all("meta")[1]["content"]


def test_samples_are_shown_with_every_panel(run):
    page = Page(report.write(run).read_text())
    images = page.all("img")
    assert [i["alt"].split(":")[0] for i in images] == ["before", "after GRPO (stage 2)"]
    assert all(i["src"].startswith("data:image/jpeg;base64,") for i in images)
    assert {(i["width"], i["height"]) for i in images} == {("400", "300")}


def test_every_metric_that_has_values_has_a_chart(run):
    page = Page(report.write(run).read_text())
    labels = [a["aria-label"] for a in page.all("svg")]
    assert labels == ["Reward over steps", "IoU over steps", "Loss over steps"]
    paths = [a["d"] for a in page.all("path")]
    assert all(re.fullmatch(r"[ML\d. -]+", d) for d in paths)
    # Reward's three lines live in stage 2; the loss in both, which are not joined.
    assert [d.count("M") for d in paths] == [1] * 6 + [1] * 2 + [2] * 2
    assert max(d.count("L") for d in paths) <= charts.POINTS
    assert " mine " in page.text


def test_lines_keep_to_the_plot():
    chart = charts.chart("t", "", {"a": [[(1.0, -3.0), (2.0, 1e-9), (3.0, 7.5)]]}, 0)
    numbers = [float(v) for v in re.findall(r"-?[\d.]+", chart.lines[0].raw)]
    xs, ys = numbers[::2], numbers[1::2]
    assert min(xs) == charts.LEFT and max(xs) == charts.WIDTH - charts.RIGHT
    assert charts.TOP <= min(ys) < max(ys) <= charts.HEIGHT - charts.BOTTOM
    assert [label for _, label in chart.y_ticks] == ["-5", "0", "5", "10"]


@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, 1e-12, 3e7])
def test_a_constant_has_a_chart_too(value):
    chart = charts.chart("t", "", {"a": [[(1.0, value)]]}, 0)
    assert "nan" not in chart.lines[0].raw
    labels = [float(label) for _, label in chart.y_ticks]
    assert min(labels) <= value <= max(labels) and len(labels) < 12


def test_the_table_compares_first_and_last(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = {score.label: rest for score, *rest in report.table(evaluation)}
    assert rows["gIoU"] == [["0.250", "0.750"], 0.5]
    assert rows["cIoU"] == [["0.200", "0.100"], -0.1]
    assert rows["box IoU"] == [["0.300", "–"], None]
    assert rows["samples"] == [["100", "100"], None]
    assert report.headline(evaluation) == [("gIoU", 0.25, 0.75)]
    page = report.write(run).read_text()
    assert '<td class="whole down">-0.100 (worse)</td>' in page
    assert '<td class="whole up">+0.500</td>' in page


def test_final_numbers_are_the_last_rows(run):
    """Beside them, so called, where the smoothed line ends."""
    text = " ".join(Page(report.write(run).read_text()).text.split())
    assert "total 5 smoothed 4.82" in text  # of 500 steps, rising to 5
    assert "mask 0.8 smoothed 0.632" in text  # the first stage's, which ends at its own last row
    (chart,) = charts.both_stages(
        [{"stage": "grpo", "step": s, "loss": v} for s, v in ((1, 2.0), (2, None))]
    )
    assert (chart.lines[0].last, chart.lines[0].smoothed) == ("–", "2")


def test_the_learning_rate_is_never_smoothed():
    """Nor averaged, where lines are thinned; nor are two stages drawn into one mean."""
    rows = [
        {"stage": stage, "step": s, "learning_rate": float(s % 3 == 0), "loss": loss}
        for stage, loss in (("alignment", 1.0), ("grpo", 9.0))
        for s in range(1, 1001)
    ]
    loss, rate = charts.both_stages(rows)
    assert rate.lines[0].smooth is None and rate.lines[0].last == "0"
    for chart in (loss, rate):
        assert len(set(re.findall(r" ([\d.]+)", chart.lines[0].raw))) == 2


def test_scores_are_explained_and_have_one_name(run):
    page = Page(report.write(run).read_text())
    for key in ("box_iou", "giou", "ciou", "samples"):
        assert pages.SCORES[key].meaning in page.text
    assert "intersection over union" in page.text and "expressions" not in page.text
    assert "alignment (stage 1)" in page.text and "40 steps" in page.text


def test_an_empty_run_has_a_report(tmp_path):
    page = Page(report.write(tmp_path).read_text())
    assert page.all("svg") == [] and page.all("img") == []


def test_panels_are_added_and_replaced(tmp_path, scene):
    image, box, mask = scene
    file = tmp_path / "samples" / "00.png"
    add_panel(file, image, "the square", box, mask, answer(scene, "before"))
    first = Image.open(file).convert("RGB")
    add_panel(file, image, "the square", box, mask, answer(scene, "after", box=None))
    info = drawing.read_info(file)
    assert [p["title"] for p in info["panels"]] == ["before", "after"]
    assert info["expression"] == "the square" and info["panels"][1]["box"] is None
    both = Image.open(file).convert("RGB")
    x, y, w, h = info["panels"][0]["at"]
    panel = (x, y, x + w, y + h)
    assert both.crop(panel).tobytes() == first.crop(panel).tobytes()
    add_panel(file, image, "the square", box, mask, answer(scene, "before", "again"))
    info = drawing.read_info(file)
    assert [p["completion"] for p in info["panels"]] == ["again", "a box"]
    assert Image.open(file).size == both.size
    assert sorted(p.name for p in file.parent.iterdir()) == ["00.png"]


def test_the_overlay_marks_answer_and_truth(scene):
    image, box, mask = scene
    shifted = np.roll(mask, -25, 1)
    picture = np.asarray(drawing.overlay(image, None, shifted, None, mask, side=320))
    assert picture.shape == (240, 320, 3)
    assert tuple(picture[120, 60]) == (45, 152, 172)  # inside the answer: half its colour
    assert tuple(picture[120, 160]) == (90, 90, 90)  # the truth is not filled
    assert (picture[120] == drawing.TRUE).all(-1).any()
    # Beside the light outline lies a dark one: one of the two is seen on any colour.
    assert (picture[120, 18:21] == drawing.PREDICTED).all(-1).any()
    assert (picture[120, 14:21] == drawing.HALO).all(-1).any()
    boxed = np.asarray(drawing.overlay(image, box, np.zeros_like(mask), side=320))
    assert tuple(boxed[80, 160]) == drawing.PREDICTED and tuple(boxed[120, 160]) == (90, 90, 90)


@pytest.mark.parametrize("color", [(48, 84, 222), (148, 52, 186), drawing.PREDICTED, drawing.HALO])
def test_a_mask_is_seen_on_any_colour(color):
    """Its outline differs much from what lies beside it, inside or outside."""
    image = np.full((60, 80, 3), color, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[20:40, 30:50] = True
    row = np.asarray(drawing.overlay(image, None, mask, side=320), int)[120, 100:160]
    contrast = np.abs(row - np.array(color)).sum(-1)
    assert (contrast > 150).sum() >= 2


def test_small_things_of_large_pictures_are_drawn():
    image, mask = np.zeros((3000, 4000, 3), np.uint8), np.zeros((3000, 4000), bool)
    mask[1500, 2000] = True
    assert (np.asarray(drawing.overlay(image, None, mask)) == drawing.PREDICTED).all(-1).any()
    mask[500:2500, 1000:3000] = True
    row = np.asarray(drawing.overlay(image, None, mask, side=4000))[1500]
    assert (row == drawing.PREDICTED).all(-1).sum() == 2 * 9 and (row == drawing.HALO).all(-1).any()


def test_the_tint_is_half_its_colour_rounded_down():
    image = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    mask = np.ones((16, 16), bool)
    picture = np.asarray(drawing.overlay(image, None, mask, side=16))
    expected = (0.5 * image + 0.5 * np.array(drawing.PREDICTED)).astype(np.uint8)
    np.testing.assert_array_equal(picture, expected)


@pytest.mark.parametrize(
    "box", [(50, 40, 30, 20), (-1e9, -5, 1e9, 1e30), (np.nan, 0, 1, 1), (np.inf, 0, 1, 1), (5,) * 4]
)
def test_any_box_a_model_writes_can_be_drawn(box, scene, tmp_path):
    image, true_box, mask = scene
    add_panel(tmp_path / "a.png", image, "x", true_box, mask, answer(scene, box=box))
    (panel,) = drawing.read_info(tmp_path / "a.png")["panels"]
    assert (panel["box"] is None) == (not np.isfinite(box).all())


def test_numbers_are_not_broken():
    font = drawing._font(16)
    lines = drawing._wrap("circle.(1234,5678),(1234,5678)", font, 70, 9)
    assert "".join(lines) == "circle.(1234,5678),(1234,5678)" and len(lines) > 3
    assert all(line.count("1234") + line.count("5678") for line in lines[1:])


def test_long_text_is_cut(scene, tmp_path):
    image, _, mask = scene
    add_panel(
        tmp_path / "a.png", image, "x" * 500, None, mask, answer(scene, completion="y" * 9999)
    )
    assert Image.open(tmp_path / "a.png").height < 600
    assert drawing.read_info(tmp_path / "a.png")["panels"][0]["completion"] == "y" * 9999
