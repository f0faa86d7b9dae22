"""Data sets in other layouts, written as `manifest.jsonl` (`sources/folder.py` reads it)."""

import base64
import binascii
import collections
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lens_jax.data.checking import printable
from lens_jax.data.masks import encode_runs
from lens_jax.data.sample import SampleError, read_image
from lens_jax.data.sources import reason_seg, refcoco
from lens_jax.data.sources.folder import FILE, parse

PICTURES = "pictures"  # where the output's pictures lie
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Words of a file's or folder's name -> the split it holds.
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val"}
SPLITS |= {"validation": "val", "test": "test", "testa": "testA", "testb": "testB"}
# Keys under which COCO-style annotations say their sentences.
SENTENCES = ("expressions", "sentences", "captions", "expression", "sentence", "caption", "phrase")


@dataclasses.dataclass(frozen=True)
class Found:
    """An object of the old layout: a manifest's row without its picture, and where that is.

    `content` holds the picture's bytes where the annotation itself brings them along.
    """

    picture: Path
    row: dict[str, Any]
    content: bytes | None = None


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """An object, or a file of them, that a manifest cannot say, and why."""

    reason: str
    text: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """`rows` were written, by split; `left_out` has (reason, how many, the first one)."""

    rows: dict[str, int]
    pictures: int
    left_out: list[tuple[str, int, str]]


def convert(
    layout: str,
    data_dir: Path,
    output: Path,
    *,
    dataset: str = "refcoco",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Summary:
    """Writes OUTPUT/manifest.jsonl and OUTPUT/pictures/; nothing if it fails or finds no object.

    Pictures are hard links where the file system allows it, so that they take no space and stay
    when the originals are removed; copies elsewhere.

    Args:
        layout: one of LAYOUTS.
        dataset: which of RefCOCO's sets; the other layouts have one.

    Raises:
        FileExistsError: `output` exists and is not empty.
        FileNotFoundError, ValueError: `data_dir` has not this layout.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: remove it or name another output")
    found = LAYOUTS[layout](data_dir, dataset) if layout == "refcoco" else LAYOUTS[layout](data_dir)
    unfinished = output.absolute().with_name(f".{output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / PICTURES).mkdir(parents=True)
    try:
        summary = _write(found, unfinished, data_dir, progress)
        if summary.rows:
            if output.exists():
                output.rmdir()
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return summary


def _write(
    found: Iterable[Found | LeftOut], folder: Path, data_dir: Path, progress: Callable
) -> Summary:
    names: dict[Path, str] = {}
    taken: set[str] = set()
    rows: collections.Counter[str] = collections.Counter()
    left_out: dict[str, tuple[int, str]] = {}
    with open(folder / FILE, "w", encoding="utf-8") as manifest:
        for item in progress(found):
            if isinstance(item, Found):
                try:
                    name = names.get(item.picture) or _name(item.picture, data_dir, taken)
                    line = json.dumps({"image": name} | item.row, ensure_ascii=True)
                    row = parse(line.encode(), rows.total() + 1)
                except ValueError as error:
                    item = LeftOut("not convertible", f"{item.picture}: {error}")
            if isinstance(item, Found) and row.error is not None:
                why = str(row.error).partition(": ")[2]
                item = LeftOut(row.error.kind, f"{item.picture}: {why}")
            if isinstance(item, Found) and item.picture not in names:
                try:
                    _place(item, folder / name)
                    names[item.picture] = name
                    taken.add(name)
                except (OSError, ValueError) as error:
                    item = LeftOut("no picture", f"{item.picture}: {error}")
            if isinstance(item, LeftOut):
                count, first = left_out.get(item.reason, (0, printable(item.text)))
                left_out[item.reason] = (count + 1, first)
                continue
            manifest.write(f"{line}\n")
            rows[row.split] += 1
    reasons = [(reason, count, first) for reason, (count, first) in left_out.items()]
    return Summary(dict(rows), len(names), sorted(reasons, key=lambda row: -row[1]))


def _name(picture: Path, data_dir: Path, taken: set[str]) -> str:
    """Where a picture goes: its place in data_dir, or its name, with a number if that is taken."""
    inside = picture.is_relative_to(data_dir) and ".." not in picture.parts
    place = picture.relative_to(data_dir) if inside else Path(picture.name)
    candidate, number = place, 1
    while (name := str(PurePosixPath(PICTURES, *candidate.parts))) in taken:
        number += 1
        candidate = place.with_stem(f"{place.stem}-{number}")
    return name


def _place(item: Found, target: Path) -> None:
    if not item.picture.is_file():
        if item.content is None:
            raise FileNotFoundError("no such picture")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(item.content)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(item.picture.resolve(), target)
    except OSError:
        shutil.copyfile(item.picture, target)


# ---- layouts -------------------------------------------------------------------------------------


def from_refcoco(data_dir: Path, dataset: str) -> Iterator[Found | LeftOut]:
    """DATA_DIR/refer_seg in REFER's layout, all splits of one data set."""
    sources = [
        refcoco.RefCoco(data_dir, dataset, split) for split in refcoco.splits(data_dir, dataset)
    ]
    return (item for source in sources for item in _refs(source))


def _refs(source: refcoco.RefCoco) -> Iterator[Found | LeftOut]:
    for ref in source.refs:
        try:
            x, y, width, height = (float(v) for v in ref.bbox)
            row = {
                "expressions": list(ref.expressions),
                **_segmentation(ref.segmentation, ref.size),
                "box": [x, y, x + width, y + height],
                "split": source.split,
            }
            yield Found(source.image_folder / ref.file_name, row)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, SampleError) as error:
            yield LeftOut("broken annotation", f"{ref.file_name}: ref {ref.ref_id} ({error})")


def from_reason_seg(data_dir: Path) -> Iterator[Found | LeftOut]:
    """DATA_DIR/reason_seg/ReasonSeg, all splits. What is to be ignored becomes background."""
    root = data_dir / "reason_seg" / "ReasonSeg"
    files = sorted(root.glob("*/*.json"))
    if not files:
        raise FileNotFoundError(f"{root} is missing, or has no split with .json files in it")
    return (_reason(file) for file in files)


def _reason(file: Path) -> Found | LeftOut:
    try:
        annotation = reason_seg.read_annotation(file)
        height, width = read_image(annotation.image).shape[:2]
        mask = reason_seg.label_map(annotation, height, width) == 1
    except (ValueError, OverflowError) as error:
        return LeftOut("broken annotation", str(error))
    except SampleError as error:
        return LeftOut("unreadable picture", str(error))
    truth = {"rle": encode_runs(mask)} if mask.any() else {"mask": None}
    row = {"expressions": list(annotation.sentences), **truth, "split": file.parent.name}
    return Found(annotation.image, row)


def from_coco(data_dir: Path) -> Iterator[Found | LeftOut]:
    """DATA_DIR/*.json or DATA_DIR/annotations/*.json in COCO's form, a split each by their names.

    An annotation's sentences are its `expressions`, `sentences`, `captions` or `caption`; else its
    picture's `caption`, if it is the only annotation there; else the name of its category, if it is
    the only one of that category there.
    """
    files = sorted([*data_dir.glob("*.json"), *data_dir.glob("annotations/*.json")])
    if not files:
        raise FileNotFoundError(f"{data_dir} holds no .json file, nor does {data_dir}/annotations")
    return (item for file in files for item in _coco_file(file, data_dir))


def _coco_file(file: Path, data_dir: Path) -> Iterator[Found | LeftOut]:
    try:
        content = json.loads(file.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        annotations = list(content["annotations"])
        names = {category["id"]: category["name"] for category in content.get("categories", ())}
        per_image = collections.Counter(a.get("image_id") for a in annotations)
        per_category = collections.Counter(
            (a.get("image_id"), a.get("category_id")) for a in annotations
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        yield LeftOut("not COCO's form", f"{file}: {type(error).__name__} {error}")
        return
    split = _split(file.stem)
    for annotation in annotations:
        where = f"{file}: annotation {annotation.get('id')}"
        try:
            image = images[annotation["image_id"]]
            if annotation.get("iscrowd"):
                yield LeftOut("a crowd", where)
                continue
            sentences = _sentences(annotation)
            if not sentences and per_image[annotation["image_id"]] == 1:
                sentences = _sentences(image)
            key = (annotation["image_id"], annotation.get("category_id"))
            if not sentences and per_category[key] == 1 and key[1] in names:
                sentences = [names[key[1]]]
            if not sentences:
                yield LeftOut("no sentence, and its category is there twice", where)
                continue
            row = {"expressions": sentences, "split": split}
            if annotation.get("segmentation"):
                size = (int(image["height"]), int(image["width"]))
                row |= _segmentation(annotation["segmentation"], size)
            if annotation.get("bbox"):
                x, y, width, height = (float(v) for v in annotation["bbox"])
                row["box"] = [x, y, x + width, y + height]
            elif "bbox" in annotation and not annotation.get("segmentation"):
                row["box"] = None
            yield Found(_coco_picture(data_dir, file.stem, image["file_name"]), row)
        except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            yield LeftOut("broken annotation", f"{where}: {type(error).__name__} {error}")


def _sentences(holder: Mapping[str, Any]) -> list[str]:
    for key in SENTENCES:
        value = holder.get(key)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            # REFER writes a sentence as an object of its own.
            return [
                v.get("sent") or v.get("raw") or "" if isinstance(v, Mapping) else v for v in value
            ]
    return []


def _coco_picture(data_dir: Path, stem: str, name: str) -> Path:
    """Where COCO data sets keep pictures: beside the file, in images/, or in the split's folder."""
    folder = stem.removeprefix("instances_").removeprefix("person_keypoints_")
    for place in ("", "images", folder, f"images/{folder}", _split(stem), f"images/{_split(stem)}"):
        if (data_dir / place / name).is_file():
            return data_dir / place / name
    return data_dir / "images" / name


def from_labelme(data_dir: Path) -> Iterator[Found | LeftOut]:
    """labelme's .json files in DATA_DIR and its folders; a folder called train, val or test is that
    split, anything else is train.

    A shape's label is its sentence, its description another one; shapes with one label and one
    group_id are one object.
    """
    files = sorted(data_dir.rglob("*.json"))
    if not files:
        raise FileNotFoundError(f"{data_dir} holds no .json file")
    return (item for file in files for item in _labelme_file(file, data_dir))


def _labelme_file(file: Path, data_dir: Path) -> Iterator[Found | LeftOut]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
        shapes = list(content["shapes"])
        picture, data = _labelme_picture(file, content)
        objects: dict[Any, list[tuple[int, dict]]] = {}
        for number, shape in enumerate(shapes):
            group = shape.get("group_id")
            key = number if group is None else (str(shape["label"]), str(group))
            objects.setdefault(key, []).append((number, shape))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        yield LeftOut("not labelme's form", f"{file}: {type(error).__name__} {error}")
        return
    split = _split(*file.relative_to(data_dir).parts[:-1])
    for members in objects.values():
        where = f"{file}: shape {members[0][0]}"
        try:
            shapes = [shape for _, shape in members]
            kinds = [shape.get("shape_type", "polygon") for shape in shapes]
            if not set(kinds) <= {"polygon", "rectangle", "circle"}:
                yield LeftOut(f"a {sorted(set(map(str, kinds)))[0]}", where)
                continue
            sentences = [shapes[0]["label"], *(s.get("description") for s in shapes)]
            row = {"expressions": [s for s in dict.fromkeys(sentences) if s], "split": split}
            polygons = [_outline(s["points"], k) for s, k in zip(shapes, kinds, strict=True)]
            if kinds == ["rectangle"]:
                row["box"] = [*polygons[0][:2], *polygons[0][4:6]]
            else:
                row["polygons"] = polygons
            yield Found(picture, row, data)
        except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            yield LeftOut("broken annotation", f"{where}: {type(error).__name__} {error}")


def _labelme_picture(file: Path, content: Mapping[str, Any]) -> tuple[Path, bytes | None]:
    """The picture that a file names, or one of its own name, or the one in it."""
    named = content.get("imagePath")
    candidates = [file.with_suffix(ending) for ending in ENDINGS]
    if isinstance(named, str) and named and "\0" not in named:
        candidates.insert(0, file.parent / named.replace("\\", "/"))
    for candidate in candidates:
        if candidate.is_file():
            return candidate, None
    data = content.get("imageData")
    if isinstance(data, str):
        try:
            return file.with_suffix(candidates[0].suffix or ".png"), base64.b64decode(data)
        except binascii.Error:
            pass
    return candidates[0], None


def _outline(points: Any, kind: str) -> list[float]:
    corners = np.array(points, np.float64)
    if kind == "polygon":
        return corners.reshape(-1, 2).ravel().tolist()
    first, second = corners  # of a rectangle two corners, of a circle its centre and one point
    if kind == "circle":
        angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        radius = np.hypot(*(second - first))
        circle = first + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        return np.round(circle, 2).ravel().tolist()
    (x0, y0), (x1, y1) = np.minimum(first, second).tolist(), np.maximum(first, second).tolist()
    return [x0, y0, x1, y0, x1, y1, x0, y1]


# ---- masks and names -----------------------------------------------------------------------------


def _segmentation(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's segmentation as a manifest writes it: `polygons` or `rle`."""
    if isinstance(segmentation, Mapping):
        return {"rle": dict(segmentation)}
    parts = list(segmentation)
    if parts and all(isinstance(part, Mapping) for part in parts):
        if len(parts) == 1:
            return {"rle": dict(parts[0])}
        return {"rle": encode_runs(refcoco.summed_mask(parts, *size) > 0)}
    return {"polygons": parts}


def _split(*names: str) -> str:
    """The split that a name's words tell; train if none does."""
    words = "_".join(names).replace("-", "_").replace(".", "_").lower().split("_")
    found = [SPLITS[w] for word in words if (w := word.rstrip("0123456789")) in SPLITS]
    return found[-1] if found else "train"


LAYOUTS: dict[str, Callable[..., Iterator[Found | LeftOut]]] = {
    "refcoco": from_refcoco,
    "reason_seg": from_reason_seg,
    "coco": from_coco,
    "labelme": from_labelme,
}
