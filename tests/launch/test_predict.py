"""launch/predict.py: files, names, mistakes."""

import errno
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from lens_jax import answers, inference
from lens_jax.commands import predict
from lens_jax.data.questions import Question
from lens_jax.inference import Result

KEYS = {
    "image", "prompt", "completion", "ended", "well_formed", "box", "mask_area", "rle"
}  # fmt: skip


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
    answer = check(output, "wide.name", "null", (120, 40))
    assert answer["image"] == str(image)
    out, err = capsys.readouterr()
    assert str(output) in out
    assert err.startswith("lens-jax: ") and f" · {checkpoint} · float32\n" in err


def test_a_folder_in_batches_of_one_shape(checkpoint, pictures, tmp_path, monkeypatch):
    """Four pictures by three."""
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
    assert (
        sum(map(int, re.findall(r"(\d+) (?:pictures? seg|cut off|without|with an|not)", out))) == 3
    )
    assert f", 1 refused: see {output}" in out
    errors = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and "bad.jpg" in errors[0]


@pytest.mark.parametrize(
    ("box", "written"),
    [
        (np.array([1, 2.5, 30, 9], np.float32), [1, 2.5, 30, 9]),
        (None, None),
    ],
)
def test_what_is_written(tmp_path, box, written):
    mask = np.zeros((30, 50), bool)
    mask[4:9, 10:31] = mask[20, 3] = True
    question = Question(tmp_path / "a.jpg", "p", "a")
    result = Result("text", box, mask, np.zeros((4, 4), np.float32), True, False)
    given = answers.write(tmp_path, question, np.zeros((30, 50, 3), np.uint8), result)
    answer = check(tmp_path, "a", "p", (50, 30))
    assert given == answer
    assert (answer["ended"], answer["well_formed"]) == (True, False)
    assert answer["box"] == written
    assert (answer["mask_area"], answer["completion"]) == (106, "text")
    assert isinstance(answer["rle"]["counts"], str) and answer["rle"]["size"] == [30, 50]


def test_mistakes_are_one_line(refused, checkpoint, pictures, tmp_path):
    picture, output = pictures / "a.jpg", tmp_path / "out"

    def says(*flags, checkpoint=checkpoint):
        return refused(predict.main, "--checkpoint", checkpoint, "--output", output, *flags)

    asked = ("--image", picture, "--prompt", "p")
    assert "nowhere" in says(*asked, checkpoint=tmp_path / "nowhere")
    assert "lens_config.json" in says(*asked, checkpoint=tmp_path)
    assert "--prompt is empty" in says("--image", picture)
    for blank in ("  ", "\u200b", "\x07"):
        assert "--prompt is empty" in says("--image", picture, "--prompt", blank)
    assert "missing.jpg does not exist" in says("--image", "missing.jpg", "--prompt", "p")
    missing = says("--jsonl", "missing.jsonl")
    assert (
        missing
        == "error: --jsonl: missing.jsonl: there is no such file or folder: check the path\n"
    )
    assert "a folder, not a file: give a file" in says("--jsonl", pictures)
    beneath = says(*asked, "--output", pictures / "notes.txt" / "below")
    assert f"{pictures / 'notes.txt' / 'below'}: a part of this path is a file" in beneath
    assert "notes.txt: not a readable picture" in says(
        "--image", pictures / "notes.txt", "--prompt", "p"
    )
    nothing = says("--image", checkpoint, "--prompt", "p")
    assert "holds no pictures, " in nothing and ".json" in nothing
    assert "notes.txt is a file" in says(*asked, "--output", pictures / "notes.txt")
    assert "one of float32, bfloat16, got half" in says(*asked, "--precision", "half")
    assert "--jsonl" in says("--prompt", "p")
    assert "--jsonl" in says(*asked, "--jsonl", picture)
    assert "--thoughts" in says(*asked, "--thoughts", "true")
    assert "true or false, got maybe" in says(*asked, "--reasoning", "maybe")
    assert "--checkpoint" in refused(predict.main, "--image", picture, "--prompt", "p")
    strip = pictures / "strip.png"
    Image.new("RGB", (900, 3)).save(strip)
    assert "strip.png: a picture of 900 x 3" in says("--image", strip, "--prompt", "p")
    assert not output.exists() or not names(output)


def test_a_mistake_in_a_list_is_one_line(refused, checkpoint, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"image": "a.jpg"}')
    error = refused(predict.main, "--checkpoint", checkpoint, "--jsonl", file)
    assert "q.jsonl, line 1: 'prompt' is missing or empty" in error


@pytest.fixture
def asked(monkeypatch):
    """What a stand-in for the model was asked; its masks are the pictures' bright pixels.

    What the sentence says happens: it is cut off, without a box, empty, malformed, a giraffe that
    is not there, or has its mask beside its box.
    """
    sentences = []

    def mask(image, prompt):
        if prompt in ("empty", "beside"):
            return np.indices(image.shape[:2])[1] >= (100 if prompt == "beside" else np.inf)
        return image[..., 0] > 128

    def box(image, prompt):
        height, width = image.shape[:2]
        return np.array([0, 0, 30 if prompt == "beside" else width, height], np.float32)

    class Fake:
        def segment_batch(self, images, prompts, *, reasoning):
            sentences.extend(prompts)
            return [
                Result(
                    "the cat.(1,2)" if prompt == "a giraffe" else f"{prompt.upper()}.(1,2)",
                    None if prompt == "without a box" else box(image, prompt),
                    mask(image, prompt),
                    np.zeros((4, 4), np.float32),
                    ended=prompt != "cut off",
                    well_formed=prompt not in ("cut off", "malformed"),
                )
                for image, prompt in zip(images, prompts, strict=True)
            ]

    monkeypatch.setattr(inference.Lens, "from_pretrained", lambda directory, **_: Fake())
    monkeypatch.setattr(predict, "BATCH", 1)
    return sentences


def test_a_second_start_skips_what_is_done(checkpoint, pictures, tmp_path, capsys, asked):
    """A missing or damaged file: asked again. The same: not. Another sentence, picture, checkpoint
    or flag: refused with nothing asked, or --overwrite true."""
    output = tmp_path / "out"

    def start(prompt, *flags) -> int:
        asked.clear()
        argv = ("--checkpoint", checkpoint, "--image", pictures, "--prompt", prompt)
        return predict.main([str(a) for a in (*argv, "--output", output, *flags)])

    def ask(prompt="it", *flags) -> int:
        assert start(prompt, *flags) == 0
        return len(asked)

    def refused(*flags) -> str:
        files = {file: file.read_bytes() for file in output.iterdir()}
        capsys.readouterr()
        assert start(*flags) == 2 and not asked
        assert {file: file.read_bytes() for file in output.iterdir()} == files
        out, error = capsys.readouterr()
        assert not out and error.startswith("error: ") and error.count("\n") == 1
        assert "give another --output, or --overwrite true" in error
        return error

    assert ask() == 4
    out = capsys.readouterr().out
    assert f"4 pictures segmented, 1 file of another kind passed over (.txt 1): see {output}" in out
    assert ask() == 0
    assert "4 pictures segmented (4 of them before)" in capsys.readouterr().out
    (output / "a.json").unlink()
    (output / "b.mask.png").write_bytes(b"cut off")
    (output / "d.overlay.png").unlink()
    assert ask() == 3
    shutil.copy(pictures / "d.jpg", pictures / "c.jpg")
    assert f"{output / 'c.json'} answers 'it' of another" in refused("it")
    assert ask("it", "--overwrite", "true") == 1
    for file in pictures.iterdir():
        os.utime(file, (1_600_000_000, 1_600_000_000))
    assert ask("it", "--precision", "float32") == 0
    for flags in (("--precision", "bfloat16"), ("--reasoning", "true")):
        assert f"{output / 'a.json'} answers 'it' of another" in refused("it", *flags)
        assert ask("it", *flags, "--overwrite", "true") == 4
        assert ask("it", *flags) == 0
    said = refused("another")
    assert f"{output / 'a.json'} answers 'it', not 'another' (and 3 more of that kind)" in said
    for stem in "bcd":
        (output / f"{stem}.json").unlink()
        (output / f"{stem}.overlay.png").unlink()
    (output / "a.json").unlink()
    assert f"{output / 'a.mask.png'} belongs to the answer to another question" in refused(
        "another"
    )
    assert ask("another", "--overwrite", "true") == 4
    assert ask("another") == 0


def test_what_came_of_questions_is_counted(checkpoint, pictures, tmp_path, capsys, asked):
    """In the last line, for answers of now and of before; what is not there is not segmented."""
    said = ("it", "cut off", "without a box", "empty", "malformed", "without a box", "it.")
    said += ("a giraffe", "beside")
    rows = [{"image": "a.jpg", "prompt": prompt} for prompt in said]
    jsonl = pictures / "questions.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--checkpoint", checkpoint, "--jsonl", jsonl, "--output", tmp_path / "out")
    counts = (
        "2 pictures segmented, 2 without a box (a.jpg, ...), 1 cut off at 12 tokens (a.jpg), "
        "1 with an empty mask (a.jpg), 1 not in the form of the training (a.jpg), "
        "1 naming something else (a.jpg), 1 with a mask outside of its box (a.jpg)"
    )
    for before in ("", ", 9 of all these before"):
        assert predict.main([str(flag) for flag in flags]) == 0
        assert f"{counts}{before}: see" in capsys.readouterr().out
    assert len(asked) == 9
    answer = tmp_path / "out" / "a.json"  # as an earlier version wrote them
    answer.write_text(
        json.dumps({k: v for k, v in json.loads(answer.read_text()).items() if k != "ended"})
    )
    assert predict.main([str(flag) for flag in flags]) == 0
    assert len(asked) == 10


def test_an_interrupt_keeps_what_is_done(checkpoint, pictures, tmp_path, capfd, asked, monkeypatch):
    """It comes while the second answer is written, or is dropped where callbacks drop exceptions;
    the same command goes on."""
    output, whole = tmp_path / "out", answers.write

    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def write(output, question, *args):
        if question.stem == "b":
            os.kill(os.getpid(), signal.SIGINT)
        elif question.stem == "c":
            Dropping()
        return whole(output, question, *args)

    monkeypatch.setattr(answers, "write", write)
    argv = ["--checkpoint", checkpoint, "--image", pictures, "--prompt", "p", "--output", output]
    for done in (2, 3):
        assert predict.main([str(a) for a in argv]) == 130
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err and "Exception" not in err
        said = f"stopped: {done} of 4 pictures done in {output}; the same command goes on"
        assert err.replace("\r", "\n").rstrip("\n").split("\n")[-1] == said
        assert names(output) == files_of(*"abcd"[:done])
    assert predict.main([str(a) for a in argv]) == 0
    assert "4 pictures segmented (3 of them before)" in capfd.readouterr().out


def test_pictures_of_one_size_and_time_are_told_apart(checkpoint, tmp_path, asked):
    """As archives and checkouts make them: asked about in one order, then in the other."""
    white = {}
    for folder, bright in (("x", 0), ("y", 1)):
        (tmp_path / folder).mkdir()
        pixels = np.zeros((30, 50), np.uint8)
        pixels[:, bright * 25 : bright * 25 + 10] = 255
        file = tmp_path / folder / "0.bmp"
        Image.fromarray(pixels).save(file)
        os.utime(file, (1_600_000_000, 1_600_000_000))
        white[str(file)] = pixels == 255
    for order in ("xy", "yx", "yx", "xy"):
        rows = [{"image": f"{folder}/0.bmp", "prompt": "it"} for folder in order]
        jsonl = tmp_path / "questions.jsonl"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--checkpoint", checkpoint, "--jsonl", jsonl, "--output", tmp_path / "out")
        flags = (*flags, "--overwrite", "true")
        assert predict.main([str(flag) for flag in flags]) == 0
        for folder, stem in zip(order, ("0", "0-2"), strict=True):
            answer = check(tmp_path / "out", stem, "it", (50, 30))
            assert answer["image"] == str(tmp_path / folder / "0.bmp")
            mask = coco_mask.decode(answer["rle"])
            np.testing.assert_array_equal(mask, white[answer["image"]])
    assert len(asked) == 6
    # The same content under another name: the answer is kept, and names it.
    shutil.move(tmp_path / "x", tmp_path / "z")
    jsonl.write_text(json.dumps({"image": "z/0.bmp", "prompt": "it"}))
    assert predict.main([str(flag) for flag in flags]) == 0
    assert len(asked) == 6
    assert check(tmp_path / "out", "0", "it", (50, 30))["image"] == str(tmp_path / "z" / "0.bmp")


def test_one_bad_name_ends_no_other(checkpoint, pictures, tmp_path, capfd, asked, monkeypatch):
    """Names that no answer can have, files that are none, files that are somebody else's."""
    shutil.copy(pictures / "a.jpg", pictures / f"{'l' * 251}.jpg")
    shutil.copy(pictures / "a.jpg", os.fsencode(pictures) + b"/caf\xe9.jpg")
    shutil.copy(pictures / "a.jpg", pictures / "new\nline.jpg")
    (pictures / "folder.png").mkdir()
    os.mkfifo(pictures / "pipe.png")
    output = tmp_path / "out"
    output.mkdir()
    (output / "b.json").write_text('{"shapes": []}')  # as labelme writes them
    Image.new("L", (4, 4)).save(output / "c.mask.png")
    (output / "d.overlay.png").mkdir()
    argv = ["--checkpoint", checkpoint, "--image", pictures, "--prompt", "p", "--output", output]
    argv = [str(a) for a in argv]
    assert predict.main(argv) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("error: ")]
    wrong = ("b.json is there", "c.mask.png is there", "d.overlay.png is there", "folder.png: a")
    for said in (*wrong, "takes 263 bytes", "pipe.png: a pipe"):
        assert sum(said in line for line in lines) == 1, (said, lines)
    assert len(lines) == 6
    assert "3 pictures segmented, 6 refused, 1 file of another kind passed over (.txt 1)" in out
    assert (output / "b.json").read_text() == '{"shapes": []}'
    with Image.open(output / "c.mask.png") as mask:
        assert mask.size == (4, 4)
    for stem in ("a", "new\nline", os.fsdecode(b"caf\xe9")):
        answer = check(output, stem, "p", (112, 112))
        assert os.path.samefile(answer["image"], pictures / f"{stem}.jpg")


@pytest.mark.parametrize(("number", "others"), [(errno.EACCES, 3), (errno.ENOSPC, 0)])
def test_an_answer_that_cannot_be_written(
    checkpoint, pictures, tmp_path, capfd, asked, monkeypatch, number, others
):
    """It costs itself; a full disk ends all, for nothing more could be kept."""
    whole = answers.write

    def write(output, question, *args):
        if question.stem == "a":
            raise OSError(number, os.strerror(number), "a.json")
        return whole(output, question, *args)

    monkeypatch.setattr(answers, "write", write)
    argv = ["--checkpoint", checkpoint, "--image", pictures, "--prompt", "p"]
    assert predict.main([str(a) for a in (*argv, "--output", tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert {errno.EACCES: "permission denied", errno.ENOSPC: "the disk is full"}[number] in err
    assert "a.json" in err and ("0 of 4 pictures done" in err) == (not others)
    assert len(list((tmp_path / "out").glob("*.json"))) == others
    assert (f"{others} pictures segmented, 1 refused" in out) == bool(others)


def test_a_sentence_that_is_too_long_is_one_line(refused, checkpoint, pictures, tmp_path):
    picture, output = pictures / "a.jpg", tmp_path / "out"
    flags = ("--checkpoint", checkpoint, "--image", picture, "--output", output)
    error = refused(predict.main, *flags, "--prompt", "red circle " * 9000)
    assert "a.jpg" in error and "tokens, more than the" in error and "shorten" in error
    error = refused(predict.main, *flags, "--prompt", "half a \udcff")
    assert r"half a \udcff" in error and "--prompt is no Unicode text" in error
    assert not names(output)
