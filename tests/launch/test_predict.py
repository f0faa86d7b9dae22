"""launch/predict.py: files, names, mistakes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from launch import predict
from lens_jax import inference
from lens_jax.data.sample import read_image
from lens_jax.inference import Result

KEYS = {"prompt", "completion", "box", "mask_area", "rle"}


@pytest.fixture
def pictures(data_dir, tmp_path):
    """A folder with four pictures of one size and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = sorted(data_dir.glob("refer_seg/images/**/*.jpg"))[:4]
    for stem, file in zip("abcd", found, strict=True):
        shutil.copy(file, folder / f"{stem}.jpg")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def files_of(*stems):
    return sorted(f"{s}.{end}" for s in stems for end in ("json", "mask.png", "overlay.png"))


def check(folder, stem, prompt, size):
    """The three files of an answer agree with each other; returns the JSON."""
    answer = json.loads((folder / f"{stem}.json").read_text())
    assert answer.keys() == KEYS
    assert answer["prompt"] == prompt
    assert isinstance(answer["completion"], str)
    with Image.open(folder / f"{stem}.mask.png") as picture:
        assert (picture.mode, picture.size) == ("L", size)
        mask = np.asarray(picture)
    assert set(np.unique(mask)) <= {0, 255}
    assert answer["mask_area"] == (mask == 255).sum()
    np.testing.assert_array_equal(coco_mask.decode(answer["rle"]), mask == 255)
    with Image.open(folder / f"{stem}.overlay.png") as overlay:
        assert overlay.size == tuple(round(n * max(1, 400 / max(size))) for n in size)
    return answer


def test_one_picture_of_any_shape(checkpoint, tmp_path, capsys):
    image = tmp_path / "wide.name.png"
    Image.fromarray(np.zeros((40, 120, 4), np.uint8), "RGBA").save(image)
    output = tmp_path / "new" / "folder"
    argv = ["--checkpoint", checkpoint, "--image", image, "--prompt", "null", "--output", output]
    assert predict.main([str(a) for a in argv]) == 0
    assert names(output) == files_of("wide.name")
    check(output, "wide.name", "null", (120, 40))
    assert str(output) in capsys.readouterr().out


def test_a_folder_in_batches_of_one_shape(checkpoint, pictures, tmp_path, monkeypatch):
    """Four pictures by three: the last batch is filled up, and nothing of that is written."""
    monkeypatch.setattr(predict, "BATCH", 3)
    output = tmp_path / "out"
    argv = ["--checkpoint", checkpoint, "--image", pictures, "--prompt", "it", "--output", output]
    assert predict.main([str(a) for a in argv]) == 0
    assert names(output) == files_of(*"abcd")
    for stem in "abcd":
        check(output, stem, "it", (112, 112))


def test_a_jsonl_file_and_a_damaged_picture(checkpoint, pictures, tmp_path, capfd, monkeypatch):
    """Paths are relative to the file; rows on one picture do not overwrite each other."""
    monkeypatch.setattr(predict, "BATCH", 3)
    (pictures / "bad.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:300])
    rows = [("a.jpg", "the red circle"), ("bad.jpg", "x"), ("b.jpg", "y"), ("a.jpg", "ein Rot „ß“")]
    jsonl = pictures / "questions.jsonl"
    lines = [json.dumps({"image": image, "prompt": prompt}) for image, prompt in rows]
    jsonl.write_text("\n\n".join(lines))
    output = tmp_path / "out"
    argv = ["--checkpoint", checkpoint, "--jsonl", jsonl, "--output", output, "--reasoning", "true"]
    assert predict.main([str(a) for a in argv]) == 2
    assert names(output) == files_of("a", "a-2", "b")
    check(output, "a", rows[0][1], (112, 112))
    check(output, "b", "y", (112, 112))
    check(output, "a-2", rows[3][1], (112, 112))
    out, err = capfd.readouterr()
    assert "3 pictures" in out
    errors = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and "bad.jpg" in errors[0]


def test_stems_are_unique(tmp_path):
    images = ["x/a.jpg", "y/a.png", "a-2.jpg", "x/a.jpg", "a-2.jpg"]
    questions = predict.name([(tmp_path / image, "p") for image in images])
    assert [q.stem for q in questions] == ["a", "a-3", "a-2", "a-4", "a-2-2"]


@pytest.mark.parametrize(
    ("box", "written"),
    [
        (np.array([1, 2.5, 30, 9], np.float32), [1, 2.5, 30, 9]),
        (None, None),
        (np.array([0, 0, np.inf, 1], np.float32), None),
    ],
)
def test_what_is_written(tmp_path, box, written):
    mask = np.zeros((30, 50), bool)
    mask[4:9, 10:31] = mask[20, 3] = True
    question = predict.Question(tmp_path / "a.jpg", "p", "a")
    result = Result("text", box, mask, np.zeros((4, 4), np.float32))
    predict.write(tmp_path, question, np.zeros((30, 50, 3), np.uint8), result)
    answer = check(tmp_path, "a", "p", (50, 30))
    assert answer["box"] == written
    assert (answer["mask_area"], answer["completion"]) == (106, "text")
    assert isinstance(answer["rle"]["counts"], str) and answer["rle"]["size"] == [30, 50]


def test_our_own_pictures_are_no_input(pictures):
    for name in ("a.mask.png", "a.overlay.png"):
        Image.new("L", (8, 8)).save(pictures / name)
    listed = [file.name for file, _ in predict._pictures(pictures, "p")]
    assert listed == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_mistakes_are_one_line(refused, checkpoint, pictures, tmp_path):
    picture, output = pictures / "a.jpg", tmp_path / "out"

    def says(*flags, checkpoint=checkpoint):
        return refused(predict.main, "--checkpoint", checkpoint, "--output", output, *flags)

    asked = ("--image", picture, "--prompt", "p")
    assert "nowhere" in says(*asked, checkpoint=tmp_path / "nowhere")
    assert "lens_config.json" in says(*asked, checkpoint=tmp_path)
    assert "--prompt is empty" in says("--image", picture)
    assert "--prompt is empty" in says("--image", picture, "--prompt", "  ")
    assert "missing.jpg does not exist" in says("--image", "missing.jpg", "--prompt", "p")
    assert "notes.txt: not a readable picture" in says(
        "--image", pictures / "notes.txt", "--prompt", "p"
    )
    assert "no pictures" in says("--image", checkpoint, "--prompt", "p")
    assert "--jsonl" in says("--prompt", "p")
    assert "--jsonl" in says(*asked, "--jsonl", picture)
    assert "--thoughts" in says(*asked, "--thoughts", "true")
    assert "true or false, got maybe" in says(*asked, "--reasoning", "maybe")
    assert "--checkpoint" in refused(predict.main, "--image", picture, "--prompt", "p")
    strip = pictures / "strip.png"
    Image.new("RGB", (900, 3)).save(strip)
    assert "strip.png: a picture of 900 x 3" in says("--image", strip, "--prompt", "p")
    assert not output.exists() or not names(output)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ('{"image": "a.jpg", "prompt": "p"}\n{"image"', "line 2: not JSON"),
        ('{"image": "a.jpg"}', "line 1: 'prompt' is missing or empty"),
        ('{"image": "a.jpg", "prompt": " "}', "line 1: 'prompt' is missing or empty"),
        ('{"prompt": "p"}', "line 1: 'image' is missing or empty"),
        ('["a.jpg", "p"]', "line 1: 'image' is missing or empty"),
    ],
)
def test_mistakes_in_a_jsonl_file(refused, checkpoint, tmp_path, text, message):
    file = tmp_path / "q.jsonl"
    file.write_text(text)
    error = refused(predict.main, "--checkpoint", checkpoint, "--jsonl", file)
    assert "q.jsonl" in error and message in error


def test_a_second_start_skips_what_is_done(checkpoint, pictures, tmp_path, capsys, monkeypatch):
    """A missing file, another sentence, a changed picture: asked again. The same: not."""
    asked = []
    box, mask = np.array([1, 2, 30, 40], np.float32), np.ones((112, 112), bool)

    class Fake:
        def segment_batch(self, images, prompts, *, reasoning):
            asked.extend(prompts)
            return [Result("text", box, mask, np.zeros((4, 4), np.float32)) for _ in prompts]

    monkeypatch.setattr(inference.Lens, "from_pretrained", lambda directory: Fake())
    monkeypatch.setattr(predict, "BATCH", 1)
    output = tmp_path / "out"

    def ask(prompt="it", *flags) -> int:
        asked.clear()
        argv = ("--checkpoint", checkpoint, "--image", pictures, "--prompt", prompt)
        assert predict.main([str(a) for a in (*argv, "--output", output, *flags)]) == 0
        return len(asked)

    assert ask() == 4
    capsys.readouterr()
    assert ask() == 0
    out = capsys.readouterr().out
    assert "4 questions are answered already" in out and "4 pictures" in out
    (output / "a.json").unlink()
    (output / "b.mask.png").write_bytes(b"cut off")
    shutil.copy(pictures / "d.jpg", pictures / "c.jpg")
    assert ask() == 3
    assert ask("it", "--reasoning", "true") == 4
    assert ask("another") == 4
    assert ask("another") == 0


def test_a_picture_that_lies_on_its_side(tmp_path):
    """EXIF orientation 6: to be turned by a quarter; everything is in the upright picture."""
    file = tmp_path / "side.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(file, exif=exif)
    assert read_image(file).shape == (60, 40, 3)


def test_a_sentence_that_is_too_long_is_one_line(refused, checkpoint, pictures, tmp_path):
    picture, output = pictures / "a.jpg", tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--image", picture, "--output", output)
    error = refused(predict.main, *flags, "--prompt", "red circle " * 9000)
    assert "a.jpg" in error and "tokens, more than the" in error and "shorten" in error
    error = refused(predict.main, *flags, "--prompt", "half a \udcff")
    assert "a.jpg" in error and r"half a \udcff" in error and "no valid Unicode" in error
    assert not names(output)
