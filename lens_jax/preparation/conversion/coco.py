"""COCO's form, as many tools export it."""

import collections
import filecmp
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lens_jax.data.masks import decode_runs, encode_runs
from lens_jax.data.sources.annotations import numbers, picture_size
from lens_jax.preparation.conversion.coco_boxes import Form, form_of_boxes
from lens_jax.preparation.conversion.objects import (
    BROKEN,
    SPLITS,
    Found,
    LeftOut,
    Picture,
    Unfit,
    dropped,
    find,
    json_files,
    polygons,
    read_json,
    split_of,
    told_split,
)

# Keys under which annotations and images say their sentences.
SENTENCES = ("expressions", "sentences", "captions", "expression", "sentence", "caption", "phrase")
# Folders that exports keep images in, whatever the file is called.
FOLDERS = ("images", "data", "JPEGImages", "")
NO_CROWD = (None, 0, "0", "", "false", "False")


def read(data_dir: Path, boxes: Form, *, keep_crowds: bool) -> Iterator[Found | LeftOut]:
    """The .json files in DATA_DIR and in its folders (annotations/, or one a split). A word of a
    file's name tells its split, or else its folder's.

    An annotation's sentences are its `expressions`, `sentences`, `captions` or `caption`; else its
    image's `caption`, if it is the only annotation there; else the name of its category, if it is
    the only one of that category, or of one below it, there.
    """
    files = json_files(data_dir, "*.json", "*/*.json")
    deeper = json_files(data_dir, "*/*/**/*.json")
    if not files:
        hint = f"; {deeper[0]} lies deeper: give a deeper --data_dir" if deeper else ""
        raise FileNotFoundError(f"{data_dir} holds no .json file, nor does a folder in it{hint}")
    left_out = [
        LeftOut("the file lies deeper than files are read", f"{file}: give a deeper --data_dir")
        for file in deeper
    ]
    return itertools.chain(_objects(files, data_dir, boxes, keep_crowds), left_out)


def _objects(
    files: Sequence[Path], data_dir: Path, boxes: Form, keep_crowds: bool
) -> Iterator[Found | LeftOut]:
    """The objects of all files; one that several files of a folder hold, as COCO's instances and
    person_keypoints do, comes once."""
    first: dict[bytes, str] = {}
    for file in files:
        for item in _file(file, data_dir, boxes, keep_crowds):
            if isinstance(item, Found):
                content = [str(file.parent), item.where.rpartition(" ")[2], str(item.picture.path)]
                text = json.dumps([*content, item.row], sort_keys=True, default=str)
                key = hashlib.blake2b(
                    text.encode(errors="surrogateescape"), digest_size=16
                ).digest()
                known = first.setdefault(key, item.group)
                if known != item.group:
                    what = f"{item.where} is in {known}"
                    yield LeftOut("another file holds the same object", what)
                    continue
            yield item


def _file(file: Path, data_dir: Path, boxes: Form, keep_crowds: bool) -> Iterator[Found | LeftOut]:
    try:
        content = read_json(file)
        for key in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise ValueError(f"it has no list of {key}")
        reader = _Reader(file, data_dir, content, boxes, keep_crowds)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        yield LeftOut("the file is not in COCO's form", f"{file}: {error}")
        return
    for annotation in content["annotations"]:
        named = annotation.get("id") if isinstance(annotation, dict) else annotation
        where = f"{file}: annotation {str(named)[:60]}"
        try:
            yield reader.object(annotation, where)
        except Unfit as error:
            yield error.at(where)
        except BROKEN as error:
            yield LeftOut("its annotation is broken", f"{where}: {error}")


class _Reader:
    """One file."""

    def __init__(
        self,
        file: Path,
        data_dir: Path,
        content: dict[str, Any],
        boxes: Form,
        keep_crowds: bool,
    ):
        self.file, self.data_dir, self.keep_crowds = file, data_dir, keep_crowds
        parts = file.relative_to(data_dir).with_suffix("").parts
        self.split = split_of(*parts)
        self.images = _by_id(content["images"])
        self.categories = _Categories(content.get("categories"))
        self.places = _places(file, data_dir, told_split(*parts))
        self.found: dict[tuple[str, ...], Picture] = {}
        info = content.get("info")
        upright = isinstance(info, Mapping) and info.get("orientation") == "upright"
        self.pixels: Literal["upright", "stored"] = "upright" if upright else "stored"
        annotations = [a for a in content["annotations"] if isinstance(a, dict)]
        # An image may be listed once for each of its sentences.
        self.per_image = collections.Counter(_key(a.get("image_id")) for a in annotations)
        self.per_category = collections.Counter(
            (self._shown(a), name)
            for a in annotations
            for name in self.categories.line(a.get("category_id"))
        )
        self.form = boxes if boxes != "auto" else form_of_boxes(annotations, self._image_size)

    def object(self, annotation: Any, where: str) -> Found | LeftOut:
        if not isinstance(annotation, dict):
            raise ValueError("it is no object")
        image = self._image(annotation)
        crowd = annotation.get("iscrowd") not in NO_CROWD
        if crowd and not (self.keep_crowds or _is_brush_mask(annotation)):
            raise Unfit("it is a crowd, not one object")
        row = {"expressions": self._sentences(annotation, image), "split": self.split}
        size = self._size(image)
        mask, remarks = _mask(annotation.get("segmentation"))
        row |= mask
        box, more = self._box(annotation, bool(mask))
        if box is not None:
            row["box"] = box
        if not mask and box is None:
            raise Unfit(
                "it has keypoints alone"
                if annotation.get("keypoints")
                else "it has neither mask nor box"
            )
        found = self._picture(_names(image))
        picture = Picture(found.path, found.roots, None, size, self.pixels)
        if crowd:
            more = [*more, "it is marked as a crowd: it was taken for one object"]
        return Found(picture, row, where, str(self.file), (*remarks, *more))

    def _image(self, annotation: dict[str, Any]) -> dict[str, Any]:
        key = annotation.get("image_id")
        image = self.images.get(_key(key))
        if image is None:
            raise Unfit("its picture is not listed in the file", f"no image with id {key!r}")
        if len(image) > 1:
            raise Unfit("its picture's id stands for several", f"images with id {key!r}")
        return image[0]

    def _shown(self, annotation: dict[str, Any]) -> str:
        """The name of an annotation's image, however often the file lists it."""
        images = self.images.get(_key(annotation.get("image_id")), [{}])
        names = _names(images[0])
        return names[0] if names else _key(annotation.get("image_id"))

    def _image_size(self, annotation: dict[str, Any]) -> tuple[int, int] | None:
        try:
            return self._size(self._image(annotation))
        except (Unfit, ValueError, TypeError):
            return None

    def _size(self, image: dict[str, Any]) -> tuple[int, int] | None:
        size = {key: _number(image.get(key)) for key in ("height", "width")}
        if all(side in (None, 0) for side in size.values()):
            return None
        return picture_size(size, "height", "width")

    def _sentences(self, annotation: dict[str, Any], image: dict[str, Any]) -> list[Any]:
        sentences = _said(annotation)
        shown = self._shown(annotation)
        if not sentences and self.per_image[_key(annotation.get("image_id"))] == 1:
            sentences = _said(image)
        if sentences:
            return sentences
        names = self.categories.line(annotation.get("category_id"))
        if not names:
            raise Unfit("it has no sentence, and its category has no name")
        if self.per_category[shown, names[0]] > 1:
            what = f"{names[0]!r} is in the picture {self.per_category[shown, names[0]]} times"
            raise Unfit("it has no sentence, and its category is there twice", what)
        return [names[0]]

    def _box(
        self, annotation: dict[str, Any], masked: bool
    ) -> tuple[list[float] | None, list[str]]:
        box = annotation.get("bbox")
        if box is None or box == []:
            return None, []
        x, y, third, fourth = numbers(box, 4, "bbox")
        if masked and not (third and fourth):
            return None, ["its bbox has no area: the mask's own is taken"]
        remarks = [] if masked else ["it has a box alone: its mask is the filled box"]
        if self.form == "xyxy":
            return [x, y, third, fourth], [*remarks, "its bbox was read as [x0, y0, x1, y1]"]
        # At the origin both readings are the same, and fractions are refused as such.
        ambiguous = self.form == "auto" and (x or y) and max(x, y, third, fourth) > 1
        if ambiguous and masked:
            return None, ["its bbox has two readings: the mask's own is taken"]
        if ambiguous:
            what = f"bbox {box}: say --boxes xywh or --boxes xyxy"
            raise Unfit("its bbox may be [x, y, width, height] or [x0, y0, x1, y1]", what)
        return [x, y, x + third, y + fourth], remarks

    def _picture(self, names: Sequence[str]) -> Picture:
        """The image in the first group of places that has it."""
        key = tuple(names)
        if key not in self.found:
            self.found[key] = self._find(names)
        return self.found[key]

    def _find(self, names: Sequence[str]) -> Picture:
        for places in self.places:
            found: list[Picture] = []
            for place in places:
                for name in names:
                    try:
                        found.append(find(self.data_dir, [place], name))
                        break
                    except Unfit:
                        continue
            others = [p for p in found[1:] if not _same(found[0].path, p.path)]
            if others:
                what = f"{found[0].path} and {others[0].path}"
                raise Unfit("several pictures have its name, and nothing tells which", what)
            if found:
                return found[0]
        everywhere = [place for places in self.places for place in places]
        return find(self.data_dir, everywhere, names[0] if names else None)


class _Categories:
    """Names of categories, with those they lie below."""

    def __init__(self, categories: Any):
        self.names: dict[str, str] = {}
        self.above: dict[str, str] = {}
        for category in categories if isinstance(categories, list) else ():
            if not isinstance(category, dict) or not isinstance(category.get("name"), str):
                continue
            self.names[_key(category.get("id"))] = category["name"]
            if isinstance(category.get("supercategory"), str):
                self.above[category["name"]] = category["supercategory"]

    def line(self, key: Any) -> list[str]:
        """A category's name, then that of the one above it, and so on."""
        names: list[str] = []
        name = self.names.get(_key(key))
        while name is not None and name not in names:
            names.append(name)
            name = self.above.get(name)
        return names


def _key(value: Any) -> str:
    """An id as other tools write it, too: 1, 1.0 or "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _by_id(images: Sequence[Any]) -> dict[str, list[dict[str, Any]]]:
    """Images by their ids; several where different files share one."""
    table: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        if isinstance(image, dict) and image.get("id") is not None:
            known = table.setdefault(_key(image["id"]), [])
            if not any(_names(other) == _names(image) for other in known):
                known.append(image)
    return table


def _places(file: Path, data_dir: Path, split: str | None) -> list[list[Path]]:
    """Folders that may hold a file's pictures: those that its name tells, then those that hold
    images of any file, then those of any split."""
    own = file.stem.removeprefix("instances_").removeprefix("person_keypoints_")
    told = [own, *(word for word, meant in SPLITS.items() if meant == split)]

    def named(words: Sequence[str]) -> list[Path]:
        return [data_dir / f"{f}{word}" for word in words for f in ("images/", "", "data/")]

    beside = [file.parent] if file.parent != data_dir else []
    anyone = [file.parent, *(data_dir / name for name in FOLDERS)]
    groups = [[*beside, *named(told)], anyone, named(list(SPLITS))]
    return [list(dict.fromkeys(p for p in group if p.is_dir())) for group in groups]


def _same(file: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(file, other, shallow=False)
    except OSError:
        return False


def _names(image: Mapping[str, Any]) -> list[str]:
    """Possible names of an image's file; LVIS gives it in `coco_url` alone."""
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(name, str) and name.strip():
        return [name]
    if not isinstance(url, str) or not url.strip():
        return []
    parts = url.split("/")
    return ["/".join(parts[-2:]), parts[-1]]


def _is_brush_mask(annotation: Mapping[str, Any]) -> bool:
    """Whether a tool of Datumaro's kind wrote a mask: it calls every one a crowd, with attributes,
    which COCO's own crowds have not."""
    segmentation = annotation.get("segmentation")
    runs = isinstance(segmentation, Mapping) and isinstance(segmentation.get("counts"), list | str)
    return runs and "attributes" in annotation


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else value


def _said(holder: Mapping[str, Any]) -> list[Any]:
    for key in SENTENCES:
        value = holder.get(key)
        if value is None or value == []:
            continue
        if not isinstance(value, list):
            return [value]
        # REFER writes a sentence as an object of its own.
        return [_text(v) if isinstance(v, Mapping) else v for v in value]
    return []


def _text(sentence: Mapping[str, Any]) -> Any:
    return next((sentence[k] for k in ("sent", "raw", *SENTENCES) if sentence.get(k)), "")


def _mask(segmentation: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A manifest's `polygons` or `rle`, and what was done; neither where there is none."""
    if segmentation is None or segmentation in ([], {}, [[]]):
        return {}, ()
    if isinstance(segmentation, Mapping):
        return {"rle": dict(segmentation)}, ()
    if isinstance(segmentation, list) and all(isinstance(s, Mapping) for s in segmentation):
        if len(segmentation) == 1:
            return {"rle": dict(segmentation[0])}, ()
        height, width = map(int, numbers(segmentation[0].get("size"), 2, "size of run lengths"))
        parts = [decode_runs(part, (height, width)) for part in segmentation]
        return {"rle": encode_runs(np.logical_or.reduce(parts))}, ()
    parts, slivers = polygons(segmentation)
    return {"polygons": parts}, dropped(slivers)
