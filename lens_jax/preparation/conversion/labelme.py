"""labelme's files, and those of tools that write the same form (X-AnyLabeling)."""

import base64
import binascii
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from lens_jax.data.masks import draw_polygons, encode_runs
from lens_jax.data.sample import to_rgb
from lens_jax.data.sources.annotations import numbers, picture_size
from lens_jax.preparation.conversion.objects import (
    BROKEN,
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
)

THUMBNAIL = (32, 32)  # of two images that are compared
SHADES, SHARE = 12, 0.02  # of grey that more than a share of pixels must differ by to be another
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What is drawn as corners in order; `rotation` and `quadrilateral` are X-AnyLabeling's.
OUTLINES = ("polygon", "rotation", "oriented_rectangle", "quadrilateral")
AREAS = (*OUTLINES, "rectangle", "circle", "mask")
WITHOUT_AREA = {
    "point": "a point has no area",
    "points": "points have no area",
    "line": "a line has no area",
    "linestrip": "a line of several parts has no area",
}
NO_OBJECT = ("__ignore__", "_background_")  # labels that labelme's own tools take for none


def read(data_dir: Path) -> Iterator[Found | LeftOut]:
    """labelme's .json files in DATA_DIR and its folders; a folder called train, val or test is that
    split, anything else is train. They speak for upright pixels and, without a size of their own,
    for images of imageData's.

    A shape's label is its sentence, its description another one; shapes with one label and one
    group_id are one object.
    """
    files = json_files(data_dir, "**/*.json")
    if not files:
        raise FileNotFoundError(f"{data_dir} holds no .json file")
    return (item for file in files for item in _file(file, data_dir))


def _file(file: Path, data_dir: Path) -> Iterator[Found | LeftOut]:
    try:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise ValueError("it has no list of shapes")
        objects: dict[Any, list[tuple[int, Any]]] = {}
        for number, shape in enumerate(content["shapes"]):
            group = shape.get("group_id") if isinstance(shape, dict) else None
            key = number if group is None else (str(shape.get("label")), str(group))
            objects.setdefault(key, []).append((number, shape))
        height, width = content.get("imageHeight"), content.get("imageWidth")
        size = None
        if height not in (None, 0) or width not in (None, 0):
            size = picture_size(content, "imageHeight", "imageWidth")
    except (ValueError, RecursionError, OSError) as error:
        yield LeftOut("the file is not in labelme's form", f"{file}: {error}")
        return
    try:
        found: Picture | Unfit = _picture(file, data_dir, content)
        inner = _inner_picture(content.get("imageData"))
        if inner is not None:
            size = size or inner.shape[:2]
            _compare(found, inner)
    except Unfit as error:
        found = error
    split = split_of(*file.relative_to(data_dir).parts[:-1])
    for members in objects.values():
        where = f"{file}: shape {members[0][0]}"
        try:
            row, done = _object([shape for _, shape in members], size)
            if isinstance(found, Unfit):
                yield found.at(where)
                continue
            picture = Picture(found.path, found.roots, found.content, size)
            yield Found(picture, row | {"split": split}, where, str(file.parent), done)
        except Unfit as error:
            yield error.at(where)
        except BROKEN as error:
            yield LeftOut("its annotation is broken", f"{where}: {error}")


def _object(
    shapes: Sequence[Any], size: tuple[int, int] | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A row without its image and split, and what was done."""
    if not all(isinstance(shape, dict) for shape in shapes):
        raise ValueError("a shape must be an object")
    label = shapes[0].get("label")
    if label in NO_OBJECT:
        raise Unfit(f"it is labelled {label}")
    said = [label, *(shape.get("description") for shape in shapes)]
    sentences = [text for text in dict.fromkeys(said) if text and str(text).strip()]
    if not sentences:
        raise Unfit("it has no label")
    row: dict[str, Any] = {"expressions": sentences}
    kinds = [_kind(shape) for shape in shapes]
    areas = [(s, kind) for s, kind in zip(shapes, kinds, strict=True) if kind not in WITHOUT_AREA]
    if not areas:
        raise Unfit(WITHOUT_AREA[kinds[0]])
    done = ("points or lines of its group were dropped",) if len(areas) < len(shapes) else ()
    outlines = [_outline(shape.get("points"), kind) for shape, kind in areas if kind != "mask"]
    if [kind for _, kind in areas] == ["rectangle"]:
        box = _upright_box(outlines[0])
        if box is not None:
            return row | {"box": box}, done
    parts, slivers = polygons(outlines) if outlines else ([], 0)
    done += dropped(slivers)
    crops = [shape for shape, kind in areas if kind == "mask"]
    if not crops:
        return row | {"polygons": parts}, done
    if size is None:
        raise ValueError("a mask needs imageHeight and imageWidth")
    mask = draw_polygons([np.reshape(part, (-1, 2)) for part in parts], size) > 0
    for crop in crops:
        _paste(mask, crop)
    return row | {"rle": encode_runs(mask)}, done


def _kind(shape: Mapping[str, Any]) -> str:
    """A shape's kind: polygon where it says none."""
    kind = shape.get("shape_type") or "polygon"
    if not isinstance(kind, str) or kind not in (*AREAS, *WITHOUT_AREA):
        raise Unfit("it is a kind of shape that is not known", str(kind)[:60])
    return kind


def _outline(points: Any, kind: str) -> list[float]:
    """The corners of a shape one after the other: x, y, x, y, ..."""
    if not isinstance(points, list):
        raise ValueError("it has no points")
    corners = np.array([numbers(point, 2, "a point") for point in points]).reshape(-1, 2)
    if kind == "circle":
        if len(corners) != 2:
            raise ValueError(f"a circle of {len(corners)} points is not its centre and one more")
        return _circle(corners[0], float(np.hypot(*(corners[1] - corners[0]))))
    if kind == "rectangle" and len(corners) == 2:
        (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
        return [x0, y0, x1, y0, x1, y1, x0, y1]
    if kind in ("rectangle", "oriented_rectangle", "rotation"):
        if len(corners) == 5 and (corners[0] == corners[4]).all():
            corners = corners[:4]
        if len(corners) != 4:
            raise ValueError(f"a rectangle of {len(corners)} points")
        # In any order: around its centre they are in the right one.
        x, y = (corners - corners.mean(0)).T
        corners = corners[np.argsort(np.arctan2(y, x))]
    return corners.ravel().tolist()


def _circle(centre: Float[np.ndarray, "2"], radius: float) -> list[float]:
    """A polygon that leaves a circle by at most a tenth of a pixel."""
    if radius == 0:
        raise ValueError("a circle without radius")
    count = min(1000, max(64, math.ceil(math.pi / math.sqrt(0.2 / radius))))
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    return np.round(points, 2).ravel().tolist()


def _upright_box(outline: Sequence[float]) -> list[float] | None:
    """xyxy of a rectangle whose sides run along the image's, else None."""
    corners = np.reshape(outline, (-1, 2))
    (x0, y0), (x1, y1) = corners.min(0).tolist(), corners.max(0).tolist()
    if not ((corners == (x0, y0)) | (corners == (x1, y1))).all():
        return None
    return [x0, y0, x1, y1]


def _paste(mask: Bool[np.ndarray, "H W"], shape: Mapping[str, Any]) -> None:
    """Adds a shape of labelme 5.3 and later: a PNG of the part between two points, which belong to
    it if they are whole numbers."""
    points = shape.get("points")
    if not isinstance(points, list) or len(points) != 2:
        raise ValueError("a mask needs two points")
    points = [numbers(point, 2, "a point") for point in points]
    try:
        with Image.open(io.BytesIO(_decoded(shape.get("mask")))) as image:
            crop = np.asarray(image) > 0
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"its mask is no picture ({error})".partition(" <")[0]) from None
    if crop.ndim != 2:
        raise ValueError("its mask is not grey")
    (x0, y0), (x1, y1) = np.round(points).astype(int).tolist()
    whole = all(value == int(value) for point in points for value in point)
    sizes = [(y1 - y0 + 1, x1 - x0 + 1), (y1 - y0, x1 - x0)]
    if whole and crop.shape not in sizes:
        found, said = (f"{size[1]} x {size[0]}" for size in (crop.shape, sizes[0]))
        raise ValueError(f"its mask has {found} pixels instead of {said}")
    top, left = max(y0, 0), max(x0, 0)
    place = mask[top : max(top, y0 + crop.shape[0]), left : max(left, x0 + crop.shape[1])]
    place |= crop[top - y0 :, left - x0 :][: place.shape[0], : place.shape[1]]


def _picture(file: Path, data_dir: Path, content: Mapping[str, Any]) -> Picture:
    """The image that a file names, or one of its own name, or the one in it."""
    reason = Unfit("its picture has no name")
    try:
        return find(data_dir, [file.parent], content.get("imagePath"))
    except Unfit as error:
        reason = error
    beside = []
    for ending in ENDINGS:
        try:
            beside.append(find(data_dir, [file.parent], f"{file.stem}{ending}"))
        except Unfit:
            continue
    if len(beside) > 1:
        names = " and ".join(picture.path.name for picture in beside)
        raise Unfit("its picture is missing, and several have its file's name", names)
    if beside:
        return beside[0]
    data = content.get("imageData")
    if data is None:
        raise reason
    try:
        pixels = _decoded(data)
        with Image.open(io.BytesIO(pixels)) as image:
            ending = ".jpg" if image.format == "JPEG" else f".{str(image.format).lower()}"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise Unfit("its imageData is no picture", str(error).partition(" <")[0]) from None
    return Picture(file.with_suffix(ending), (), pixels)


def _inner_picture(data: Any) -> UInt8[np.ndarray, "H W 3"] | None:
    """imageData's image, upright, where it is one."""
    if not data:
        return None
    try:
        with Image.open(io.BytesIO(_decoded(data))) as image:
            return to_rgb(image)
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return None


def _compare(picture: Picture, inner: UInt8[np.ndarray, "H W 3"]) -> None:
    """Raises Unfit where the file beside shows another image than imageData, which labelme shows:
    either may be the one that was annotated, for tools that turn and crop leave imageData behind.

    The same image in another size, or encoded anew, is no other.
    """
    if picture.content is not None or not picture.path.resolve().is_relative_to(
        picture.roots[0].resolve()
    ):
        return
    try:
        with Image.open(picture.path) as image:
            beside = to_rgb(image)
    except Exception:  # said when the image is asked for
        return
    small = [
        np.asarray(Image.fromarray(pixels).convert("L").resize(THUMBNAIL, Image.Resampling.BOX))
        for pixels in (beside, inner)
    ]
    far = np.abs(small[0].astype(int) - small[1]) > SHADES
    if far.mean() > SHARE:
        what = f"{picture.path}: remove it, or imageData, whichever was not annotated"
        raise Unfit("its imageData shows another picture than its file", what)


def _decoded(text: Any) -> bytes:
    """Base64, bare or as a data URI, with or without line breaks and the signs at its end."""
    if not isinstance(text, str):
        raise ValueError("it is no text in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"it is no base64 ({error})") from None
