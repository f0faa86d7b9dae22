"""Mutated manifests, annotation files and pictures: no trace, no hang, and counts that add up.

A case is drawn from its number. It mutates a small data set of one's own and reads it with the
check and with the training pipeline; another mutates a layout that convert reads.
"""

import itertools
import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from lens_jax.commands import data as command
from lens_jax.data.buckets import Buckets
from lens_jax.data.masks import encode_runs
from lens_jax.data.pipeline import Pipeline
from lens_jax.data.sample import SampleError
from lens_jax.data.sources.folder import Folder
from lens_jax.data.sources.refcoco import RefCoco
from lens_jax.preparation import checking

FEW, MANY = 60, 500
SIDE = 40
BUCKETS = Buckets(
    prompt_tokens=(64, 512), windows=(4, 64), canvas=((64, 64), (448, 448)), answer_tokens=(400,)
)
# What a value of an annotation may turn into.
VALUES = [
    None,
    True,
    0,
    -1,
    3.5,
    10**9,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../a.png",
    "\udcff\udcfe.png",
    "a\0b",
    "y" * 10_000,
    [],
    [[]],
    {},
    [None],
    [1, 2],
    [[1, 2], [3, 4]],
    [float("nan")] * 6,
    [1e8, -1e8, 5, 5, 1e8, 1e8],
    [-5, -5, 500, 500],
    [[0, 0, 1e12, 0, 5, 5]],
    [[0, 0, 70, 0, -70, 70]],
    {"size": [SIDE, SIDE], "counts": [SIDE * SIDE * 2]},
    {"size": [SIDE, SIDE], "counts": "~~~~~~~~"},
    {"size": [10**6, 10**6], "counts": [10**12]},
    {"size": "x", "counts": None},
    [{"size": [SIDE, SIDE], "counts": [3, 5]}] * 2,
]


def mutate(value, rng, depth=0):
    """A JSON value with one thing in it changed, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[rng.integers(len(value))]
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.15:
            return value | {f"{key}s": value[key]}
        return value | {key: mutate(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = int(rng.integers(len(value)))
        action = rng.random()
        if action < 0.1:
            return value[:place] + value[place + 1 :]
        if action < 0.2:
            return value[: place + 1] + value[place:]
        return [*value[:place], mutate(value[place], rng, depth + 1), *value[place + 1 :]]
    return VALUES[rng.integers(len(VALUES))]


def mutate_bytes(content, rng):
    """Cut off, with bytes changed, with a part of it repeated, or emptied."""
    content = bytearray(content)
    action = rng.integers(5)
    place = int(rng.integers(max(1, len(content))))
    if action == 0:
        return bytes(content[:place])
    if action == 1:
        return b""
    if action == 2:
        return bytes(content[:place] + content[place // 2 :])
    for _ in range(int(rng.integers(1, 12))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    return bytes(content)


def odd_picture(file, rng):
    """Writes one of the kinds of pictures that people have."""
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    picture, grey = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 12))
    kinds = [
        lambda: picture.convert("CMYK").save(file, "JPEG"),
        lambda: picture.save(file, "JPEG", exif=exif),
        lambda: picture.save(file, "GIF", save_all=True, append_images=[grey]),
        lambda: Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(file, "PNG"),
        lambda: Image.fromarray(pixels[..., 0].astype(np.int32) * 2**20).save(file, "TIFF"),
        lambda: Image.fromarray(pixels[..., 0].astype(np.float32)).save(file, "TIFF"),
        lambda: picture.convert("P").save(file, "PNG", transparency=3),
        lambda: picture.convert("RGBA").save(file, "WEBP"),
        lambda: grey.convert("LA").save(file, "PNG"),
        lambda: grey.convert("1").save(file, "BMP"),
        lambda: Image.new("RGB", (1, 1)).save(file, "PNG"),
        lambda: Image.new("RGB", (1, 500)).save(file, "PNG"),
        lambda: Image.new("1", (9000, 9999)).save(file, "PNG"),
        lambda: picture.resize((300, 7)).save(file, "PNG"),
        lambda: file.write_bytes(b"P6 0 0 255\n"),
        lambda: file.write_bytes(b"P6 99999 99999 255\n123"),
        lambda: file.write_bytes(b"GIF89a\0\0\0\0\0\0\0"),
    ]
    kinds[rng.integers(len(kinds))]()


def write_folder(directory, rng):
    """Eight rows, of which a few, or their files, are mutated; returns how many lines there are."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[5:20, 8:30] = 255
    Image.fromarray(mask).save(directory / "mask.png")
    forms = [
        {"mask": "mask.png"},
        {"polygons": [[8, 5, 30, 5, 30, 20, 8, 20]]},
        {"rle": encode_runs(mask > 0)},
        {"box": [8, 5, 30, 20]},
        {"box": None},
        {"mask": "mask.png", "box": [8, 5, 30, 20], "split": "val"},
    ]
    rows = []
    for i in range(8):
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
        rows.append({"image": f"{i}.png", "expressions": ["it", f"thing {i}"]} | forms[i % 6])
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(8))
        action = rng.random()
        file = directory / ("mask.png" if rng.random() < 0.3 else f"{place}.png")
        if action < 0.5:
            rows[place] = mutate(rows[place], rng)
        elif action < 0.75:
            odd_picture(file, rng)
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), rng))
    content = "\n".join(json.dumps(row) for row in rows).encode()
    if rng.random() < 0.2:
        content = mutate_bytes(content, rng)
    (directory / "manifest.jsonl").write_bytes(content)
    return sum(bool(line.strip()) for line in content.split(b"\n"))


def run(argv, capsys):
    """The data command's exit code and output; whatever it raised would fail the test."""
    capsys.readouterr()
    code = command.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, out, err


def check_folder(directory, lines, capsys):
    """The command's table, the report and the sources tell the same."""
    code, out, err = run(["check", "--data_dir", directory, "--thumbnails", 3], capsys)
    if lines == 0:
        assert code == 2 and "is empty" in err
        return None
    report = checking.check(directory)
    *splits, total = report.counts()
    assert total["rows"] == lines == sum(c["rows"] for c in splits)
    assert sum(count for _, count, _ in report.errors()) == report.unusable == total["unusable"]
    for count in report.counts():
        assert count["rows"] == count["usable"] + count["unusable"]
    assert code == (2 if report.unusable else 0)
    last = next(line for line in out.splitlines() if line.startswith("all "))
    assert last.split()[1:4] == [str(total[key]) for key in ("rows", "usable", "unusable")]
    assert (directory / "check.html").stat().st_size > 1000
    return report


def read_split(directory, split, report, processor):
    """What a run reads of a split: usable rows come out, the others are counted."""
    source = Folder(directory, split)
    usable = set()
    for i in range(len(source)):
        try:
            sample = source[i]
        except SampleError:
            continue
        usable.add(source.rows[i].line)
        assert sample.mask.shape == sample.image.shape[:2] and sample.mask.dtype == bool
        assert (sample.box is None) == (not sample.mask.any())
    good = {v.row.line for v in report.verdicts if v.error is None and v.row.split == split}
    assert usable == good
    if not good:
        return
    pipeline = Pipeline(source, processor, 2, 0, buckets=BUCKETS, num_threads=0)
    batches = list(itertools.islice(pipeline, -(-len(source) // 2)))
    assert all(np.isfinite(batch.targets.box).all() for batch in batches)
    bad = len(source) - len(good)
    assert bad <= pipeline.bad_samples <= bad + len(source) % 2 + _too_large(source, usable)


def _too_large(source, usable):
    """Rows that are read, but whose sentences or pictures fit no bucket."""
    return sum(row.line in usable and max(map(len, row.expressions)) > 300 for row in source.rows)


def fuzz_folder(number, directory, processor, capsys):
    rng = np.random.default_rng((1, number))
    lines = write_folder(directory, rng)
    report = check_folder(directory, lines, capsys)
    if report is None:
        return
    for split in {v.row.split for v in report.verdicts} - {None}:
        read_split(directory, split, report, processor)


def layouts(directory, rng):
    """Writes one of the layouts that convert reads, mutated."""
    square = [8, 5, 30, 5, 30, 20, 8, 20]
    kind = ("coco", "labelme", "reason_seg", "refcoco")[int(rng.integers(4))]
    pixels = rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    if kind == "coco":
        folder, name = directory, "a.png"
        content = {
            "images": [{"id": 1, "file_name": name, "height": SIDE, "width": SIDE}],
            "categories": [{"id": 1, "name": "cup"}],
            "annotations": [
                {
                    "id": i,
                    "image_id": 1,
                    "category_id": 1,
                    "bbox": [8, 5, 22, 15],
                    "segmentation": [square],
                    "expressions": ["it", f"{i}"],
                }
                for i in range(3)
            ],
        }
        file = directory / "train.json"
    elif kind == "labelme":
        folder, name, file = directory, "a.png", directory / "a.json"
        points = [[8, 5], [30, 5], [30, 20]]
        content = {
            "imagePath": name,
            "shapes": [
                {"label": "cup", "points": points, "shape_type": "polygon", "group_id": None},
                {"label": "pan", "points": points[::2], "shape_type": "rectangle"},
                {"label": "lid", "points": points[:2], "shape_type": "circle", "group_id": 3},
            ],
        }
    elif kind == "reason_seg":
        folder = directory / "reason_seg" / "ReasonSeg" / "train"
        name, file = "a.jpg", folder / "a.json"
        points = [[8, 5], [30, 5], [30, 20]]
        content = {"text": ["why"], "shapes": [{"label": "target", "points": points}]}
    else:
        folder = directory / "refer_seg" / "images" / "train2014"
        name, file = "a.jpg", directory / "refer_seg" / "refcoco" / "instances.json"
        ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "train"}
        refs = [ref | {"sentences": [{"sent": "it"}]}, ref | {"sentences": [{"sent": "that"}]}]
        content = {
            "images": [{"id": 1, "file_name": name, "height": SIDE, "width": SIDE}],
            "annotations": [{"id": 1, "bbox": [8, 5, 22, 15], "segmentation": [square]}],
        }
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    if kind == "refcoco":
        if rng.random() < 0.5:
            refs = mutate(refs, rng)
        refs = pickle.dumps(refs)
        if rng.random() < 0.2:
            refs = mutate_bytes(refs, rng)
        file.with_name("refs(unc).p").write_bytes(refs)
    for _ in range(int(rng.integers(1, 3))):
        content = mutate(content, rng)
    text = json.dumps(content).encode()
    if rng.random() < 0.2:
        text = mutate_bytes(text, rng)
    file.write_bytes(text)
    if rng.random() < 0.3:
        odd_picture(folder / name, rng)
    return kind


def fuzz_convert(number, directory, processor, capsys):
    rng = np.random.default_rng((2, number))
    kind = layouts(directory / "old", rng) if (directory / "old").mkdir() is None else None
    new = directory / "new"
    argv = ["convert", "--from", kind, "--data_dir", directory / "old", "--output", new]
    code, out, err = run(argv, capsys)
    if not new.exists():
        assert code == 2 and err.count("error: ") == 1
    else:
        counts = dict(line.rsplit(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
        written, left_out = int(counts["written"]), int(counts["left out"])
        assert int(counts["all"]) == written + left_out
        assert code == 0 and written
        assert check_folder(new, written, capsys).unusable == 0
    if kind == "refcoco":
        try:
            source = RefCoco(directory / "old", "refcoco", "train")
        except (ValueError, FileNotFoundError):
            return
        for i in range(len(source)):
            try:
                source[i]
            except SampleError:
                continue
    assert not list(directory.glob(".*unfinished"))


FUZZ = {"folder": fuzz_folder, "convert": fuzz_convert}


def fuzz(kind, numbers, tmp_path, processor, capsys):
    for number in numbers:
        directory = tmp_path / str(number)
        directory.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                FUZZ[kind](number, directory, processor, capsys)
            except BaseException as error:
                error.add_note(f"fuzzing {kind}, case {number}")
                raise
        shutil.rmtree(directory)


@pytest.mark.parametrize("kind", FUZZ)
def test_few_mutations(kind, tmp_path, processor, capsys):
    fuzz(kind, range(FEW // 2), tmp_path, processor, capsys)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", FUZZ)
def test_many_mutations(kind, tmp_path, processor, capsys):
    fuzz(kind, range(FEW // 2, FEW // 2 + MANY // 2), tmp_path, processor, capsys)
