"""The data commands: their tables, pages, exit codes and mistakes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lens_jax.commands import data, evaluate
from lens_jax.data.buckets import Buckets
from lens_jax.data.pipeline import Pipeline
from lens_jax.data.processor import Processor
from lens_jax.data.sources.folder import Folder

ROW = {"image": "a.png", "expressions": ["it"], "box": [4, 3, 20, 15]}


@pytest.fixture
def folder(tmp_path):
    """Writes rows beside a picture a.png; returns data_dir."""
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / "a.png")

    def write(*rows):
        (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path)

    return write


def test_check_prints_counts_and_writes_a_page(folder, tmp_path, capsys):
    directory = folder(ROW, ROW | {"split": "val"}, ROW | {"image": "b.png"}, 3)
    assert data.main(["check", "--data_dir", directory]) == 2
    out = capsys.readouterr().out
    assert re.search(r"^split +rows +usable +unusable +no target +samples +pictures$", out, re.M)
    assert re.search(r"^train +2 +1 +1 +0 +1 +1$", out, re.M)
    assert re.search(r"^all +4 +2 +2 +0 +2 +1$", out, re.M)
    assert re.search(r"^unreadable picture +1 +manifest\.jsonl, line 3: .*b\.png", out, re.M)
    assert re.search(r"^split leakage +2 +manifest\.jsonl, line 1: ", out, re.M)
    assert "no such picture" in (tmp_path / "check.html").read_text()
    page = tmp_path / "pages" / "x.html"
    directory = folder(ROW)
    assert data.main(["check", "--data_dir", directory, "--page", str(page)]) == 0
    assert "unusable" in capsys.readouterr().out and page.read_text().count("data:image") == 1


def test_check_says_what_training_needs(folder, tmp_path, checkpoint, capsys):
    """A split to evaluate on, and the smallest buckets that a checkpoint's training takes."""
    Image.new("RGB", (700, 500)).save(tmp_path / "large.png")
    row = ROW | {"image": "large.png", "expressions": ["it", "the cup on the left of the table"]}
    directory = folder(ROW, row)
    assert data.main(["check", "--data_dir", directory, "--checkpoint", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "no split but train: training needs one to evaluate on (data.eval_split)" in out
    (flags,) = re.findall("^all usable rows fit into (.+)$", out, re.M)
    needed = {key: json.loads(value) for key, value in re.findall(r"--data\.(\w+) '(.+?)'", flags)}
    processor = Processor.from_pretrained(checkpoint)
    examples = [
        processor.example(sample, text)
        for sample in Folder(directory)
        for text in sample.expressions
    ]
    for example in examples:
        example.needs.check(Buckets(**needed))
    assert needed["windows"] == [max(len(e.prompt.patches) for e in examples)]
    longest = max(len(e.prompt.tokens) for e in examples)
    assert longest <= needed["prompt_tokens"][0] < longest + 64
    side = processor.sam_size
    assert needed["canvas"] == [[min(500, side), min(700, side)]]
    # What the check says of masks is what training counts: large.png's, once of two rows.
    assert "\n1 of them with a mask shrunken to that canvas" in out
    epoch = Pipeline(Folder(directory), processor, 2, 0, buckets=Buckets(**needed))
    next(epoch)
    assert (epoch.bad_samples, epoch.shrunken_masks) == (0, 1)


def test_convert(tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    shapes = [
        {"label": "cup", "points": [[4, 3], [20, 3], [20, 15]]},
        {"label": "way", "points": [[4, 3], [20, 3]], "shape_type": "line"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "a.png", "shapes": shapes}))
    out = tmp_path / "out"
    argv = ["convert", "--from", "labelme", "--data_dir", str(tmp_path), "--output", str(out)]
    assert data.main(argv) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^left out +1$", printed, re.M) and re.search(r"^all +2$", printed, re.M)
    assert re.search(r"^a line has no area +1 +.*a\.json: shape 1$", printed, re.M)
    assert json.loads((out / "manifest.jsonl").read_text())["image"] == "pictures/a.png"
    assert data.main(["check", "--data_dir", str(out)]) == 0
    assert data.main(argv) == 2 and "exists already" in capsys.readouterr().err


def test_convert_says_what_it_did(tmp_path, capsys):
    """And scales resized pictures' annotations on request."""
    data_dir, out = tmp_path / "data", tmp_path / "out"
    (data_dir / "train").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(data_dir / "train" / "a.jpg")
    annotation = {"image_id": 1, "category_id": 1, "bbox": [8, 6, 32, 24], "area": 768}
    annotation["segmentation"] = [[8, 6, 40, 6, 40, 30, 8, 30], [3, 3, 4, 4]]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 80, "height": 60}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "cup"}],
    }
    (data_dir / "train" / "_annotations.coco.json").write_text(json.dumps(content))
    argv = ["convert", "--from", "coco", "--data_dir", str(data_dir), "--output", str(out)]
    assert data.main(argv) == 2
    said = capsys.readouterr()
    text = r"^its picture was resized after it was annotated +1 .*40 x 30 .* says 80 x 60"
    assert re.search(text, said.out, re.M) and "no object can be converted" in said.err
    assert data.main([*argv, "--resized", "scale"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^to look at +objects +the first one$", printed, re.M)
    assert re.search(r"^scaled to the size of its picture +1 .*annotation None$", printed, re.M)
    assert re.search(r"^parts of it with under three corners were dropped +1 ", printed, re.M)
    assert Folder(out)[0].box.tolist() == [4, 3, 20, 15]


def test_percent_ends_with_2_unless_the_flag_says_pixels(tmp_path, capsys):
    data_dir, out = tmp_path / "data", tmp_path / "out"
    (data_dir / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}]}
    part = [[10, 20, 60, 20, 60, 90]]
    for i in range(5):
        Image.new("RGB", (640, 480)).save(data_dir / "images" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png"})
        content["annotations"].append({"image_id": i, "category_id": 1, "segmentation": part})
    (data_dir / "instances_val.json").write_text(json.dumps(content))
    argv = ["convert", "--from", "coco", "--data_dir", str(data_dir), "--output", str(out)]
    assert data.main(argv) == 2 and not out.exists()
    said = capsys.readouterr().out
    assert "its coordinates are percent of the picture's sides, not pixels" in said
    flag = ["--coordinates", "pixels"]
    assert data.main([*argv, *flag]) == 0
    assert data.main(["check", "--data_dir", str(out)]) == 2
    assert "say --coordinates pixels if they are" in capsys.readouterr().out
    assert data.main(["check", "--data_dir", str(out), *flag]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a command"),
        (["chek"], "did you mean check"),
        (["check"], "give --data_dir"),
        (["check", "--data_dir", "nowhere"], "nowhere/manifest.jsonl is missing"),
        (["check", "--data_dir", "x", "--pages", "y"], "did you mean --page?"),
        (["convert", "--data_dir", "x"], "give --from, --output"),
        (
            ["convert", "--from", "voc", "--data_dir", "x", "--output", "y"],
            "--from: expected one of",
        ),
        (
            ["convert", "--from", "coco", "--data_dir", "x", "--output", "y"],
            "x holds no .json file, nor does a folder in it",
        ),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert data.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_an_empty_manifest_is_one_line(tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text("\n \n")
    assert data.main(["check", "--data_dir", str(tmp_path)]) == 2
    assert "manifest.jsonl is empty" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["check", "--help"], ["convert", "--help"]])
def test_help_has_examples(argv, capsys):
    try:
        assert data.main(argv) == 0
    except SystemExit as exit:
        assert exit.code == 0
    out = capsys.readouterr().out
    assert "python launch/data.py" in out or "expressions" in out
    assert "--from_" not in out


def test_a_converted_data_set_scores_the_same(checkpoint, data_dir, tmp_path, capsys):
    """Evaluated with --dataset folder, apart from what the data set is called."""
    mine = tmp_path / "mine"
    argv = ["--from", "refcoco", "--data_dir", str(data_dir), "--output", str(mine)]
    assert data.main(["convert", *argv]) == 0
    scores = []
    for dataset, directory in (("refcoco", data_dir), ("folder", mine)):
        output = tmp_path / f"{dataset}.json"
        argv = ["--checkpoint", checkpoint, "--dataset", dataset, "--split", "val"]
        argv += ["--data_dir", directory, "--limit", 3, "--batch_size", 2, "--output", output]
        assert evaluate.main([str(arg) for arg in argv]) == 0
        scores.append(json.loads(output.read_text()))
    left, right = ({k: v for k, v in s.items() if k not in ("dataset", "seconds")} for s in scores)
    assert left == right and left["samples"] == 3
