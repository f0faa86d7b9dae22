"""Questions from folders and lists, and what their answers are called."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lens_jax import answers
from lens_jax.data.questions import ImageFolder, ListError, Question, name, read_list
from lens_jax.inference import Result

ROW = {"image": "a.png", "prompt": "the circle"}


def stems(*images):
    return [question.stem for question in name([(Path(image), "p") for image in images])]


def test_stems_are_unique():
    images = ["x/a.jpg", "y/a.png", "a-2.jpg", "x/a.jpg", "a-2.jpg"]
    assert stems(*images) == ["a", "a-3", "a-2", "a-4", "a-2-2"]


def test_stems_are_unique_where_case_and_accents_do_not_count():
    """Windows and macOS would write the second answer over the first."""
    assert stems("A.png", "a.png", "B/a.png") == ["A", "a-2", "a-3"]
    assert stems("caf\u00e9.png", "cafe\u0301.png") == ["caf\u00e9", "cafe\u0301-2"]
    assert stems("a-2.png", "A.png", "a.png") == ["a-2", "A", "a-3"]


def test_a_folder_counts_what_is_passed_over(tmp_path):
    for file in ("b.jpg", "A.PNG", "c.mpo", "x.heic", "y.HEIC", "z.txt", "README", "paper.pdf"):
        (tmp_path / file).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "more").mkdir()
    for file in ("._b.jpg", ".DS_Store"):
        (tmp_path / file).touch()
    result = Result("", None, np.eye(8, dtype=bool), np.eye(2), True, True)
    question = Question(tmp_path / "b.jpg", "it", "b")
    answers.write(tmp_path, question, np.zeros((8, 8, 3), np.uint8), result, "asked")
    folder = ImageFolder.of(tmp_path)
    assert [file.name for file in folder.pictures] == ["A.PNG", "b.jpg", "c.mpo", "folder.png"]
    files, folders = folder.passed_over
    assert files.startswith("5 files of other kinds passed over (.heic 2, ")
    for kind in (".txt 1", ".pdf 1", "no ending 1"):
        assert kind in files
    assert folders == "1 folder not entered"


def test_names_alone_make_no_answers(tmp_path):
    """A user's own masks are pictures like others, and files beside them are counted."""
    for file in ("dog.mask.png", "dog.overlay.png"):
        Image.new("L", (8, 8)).save(tmp_path / file)
    (tmp_path / "dog.json").touch()
    folder = ImageFolder.of(tmp_path)
    assert [file.name for file in folder.pictures] == ["dog.mask.png", "dog.overlay.png"]
    assert folder.passed_over == ["1 file of another kind passed over (.json 1)"]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\n",
        b"\r\n" + json.dumps(ROW).encode() + b"\r\n",
        json.dumps(ROW | {"prompt": " the circle \r", "more": 1}).encode(),
        json.dumps(ROW | {"image": ".\\a.png"}).encode(),
        json.dumps(ROW | {"image": "~/a.png"}).encode(),
    ],
)
def test_lists_as_other_systems_write_them(tmp_path, monkeypatch, text):
    (tmp_path / "a.png").touch()
    (tmp_path / "q.jsonl").write_bytes(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    ((image, prompt),) = read_list(tmp_path / "q.jsonl")
    assert image.samefile(tmp_path / "a.png") and prompt == "the circle"


def test_a_name_that_is_a_file_is_meant_literally(tmp_path):
    for file in ("~", ".\\a.png"):
        (tmp_path / file).touch()
    rows = [json.dumps(ROW | {"image": image}) for image in ("~", ".\\a.png", "no\\where.png")]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    images = [image for image, _ in read_list(tmp_path / "q.jsonl")]
    assert images == [tmp_path / "~", tmp_path / ".\\a.png", tmp_path / "no\\where.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no questions"),
        (json.dumps(ROW).encode() + b'\n{"image"', "line 2: not JSON"),
        (b'{"image": "a.jpg"}', "line 1: 'prompt' is missing or empty"),
        (b'{"image": "a.jpg", "prompt": " "}', "line 1: 'prompt' is missing or empty"),
        *(
            (json.dumps(ROW | {"prompt": text}).encode(), "line 1: 'prompt' is empty")
            for text in ("\u200b", "\ufeff", "\x07", " \u200b\n")
        ),
        (b'{"image": "a.jpg", "prompt": "a\\ud800"}', "line 1: 'prompt' is no Unicode text"),
        (b'{"prompt": "p"}', "line 1: 'image' is missing or empty"),
        (b'{"image": "a.jpg", "prompt": ["p"]}', "line 1: 'prompt' is text, not [\"p\"]"),
        (b'"a.jpg"', "line 1: 'image' is missing or empty"),
        (b"[" * 99_999, "a JSON list; write one object a line"),
        (b'{"a":' * 99_999, "line 1: not JSON"),
        (json.dumps([ROW]).encode(), "a JSON list; write one object a line"),
        (json.dumps(ROW).encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (b'{"image": "\xff"}', "not UTF-8 text"),
    ],
)
def test_mistakes_in_a_list_are_one_line(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_bytes(text)
    with pytest.raises(ListError) as error:
        read_list(tmp_path / "q.jsonl")
    assert "q.jsonl" in str(error.value) and message in str(error.value)
