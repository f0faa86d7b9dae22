"""Masks as image files: what is object in them, and what background.

- Grey (bilevel, 8, 16 or 32 bits): 0 is background.
- Palette: number 0 is background where its colour is black, whatever the others are. Where it has
  a hue (red, say) and black is in use, too, the colours speak: black is background.
- Colour: black is background.
- Transparent pixels are background, and all others object, whatever their colour.
- A soft edge is object from half of the largest value on. An edge is soft where there are more than
  two values, the largest of them bright, and the others fill no area; bright shades of more than 16
  are always soft. Other values are several objects, and count as one.

What leaves two readings is refused: a palette without black, or whose number 0 is white or grey
while another one in use is black; transparent pixels beside black ones.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Shaped, UInt8
from PIL import Image

from lens_jax.data.sample import orientation, turn

FEW = 16  # values or colours that a mask may have before they are shades
# Formats that keep every pixel; WEBP, JPEG2000 and TIFF do so in some of their files.
LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "PCX", "PPM", "QOI", "SGI", "SUN", "TGA")
LOSSY = ("JPEG", "MPO", "AVIF", "WEBP", "JPEG2000", "TIFF")
TIFF_LOSSY = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")
GREY = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")


@dataclasses.dataclass(frozen=True)
class MaskFile:
    """A mask, upright as its file's EXIF orientation says, and what is doubtful about how it was
    read: (two or three words, the whole of it)."""

    mask: Bool[np.ndarray, "H W"]
    doubts: tuple[tuple[str, str], ...]


def read_mask(path: Path) -> MaskFile:
    """Decodes a mask.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, damaged, of several frames, or in a format that does not keep
            every pixel, told by its content.
    """
    try:
        with Image.open(path) as image:
            if image.format not in (*LOSSLESS, *LOSSY):
                raise ValueError(f"masks in {image.format} are not read; save it as PNG")
            if not _keeps_every_pixel(image, path):
                raise ValueError(f"{image.format} blurs masks; save it as PNG")
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} frames; save the one that is meant")
            image.load()
            mask, doubts = _foreground(image)
            return MaskFile(turn(mask, orientation(image)), tuple(doubts))
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(str(error) or type(error).__name__) from error


def _keeps_every_pixel(image: Image.Image, path: Path) -> bool:
    if image.format == "TIFF":
        return image.info.get("compression") not in TIFF_LOSSY
    if image.format == "WEBP":
        content = path.read_bytes()
        chunk = 12  # behind "RIFF", the length and "WEBP"
        while chunk + 8 <= len(content):
            if content[chunk : chunk + 4] in (b"VP8 ", b"ANIM"):
                return False
            length = int.from_bytes(content[chunk + 4 : chunk + 8], "little")
            chunk += 8 + length + length % 2
        return True
    if image.format == "JPEG2000":
        content = path.read_bytes()
        place = content.find(b"\xff\x4f\xff\x51") + 2  # the codestream's markers follow
        while 2 <= place <= len(content) - 14 and content[place] == 0xFF:
            if content[place + 1] == 0x52:  # coding style: its last byte is the wavelet
                return content[place + 13] == 1  # the reversible one
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        return False
    return image.format in LOSSLESS


def _foreground(image: Image.Image) -> tuple[Bool[np.ndarray, "H W"], list[tuple[str, str]]]:
    """The pixels that are object, and doubts about them."""
    doubts = []
    pixels, alpha = _channels(image)
    opaque = np.ones(pixels.shape[:2], bool)
    if alpha is not None:
        opaque, shades, soft = _object(alpha, alpha)
        if soft:
            what = f"{shades} degrees of transparency: from half on it is object"
            doubts.append(("soft edge", what))
    values, codes = pixels, pixels
    if image.mode in ("P", "PA"):
        values = codes = _palette_values(image, pixels, opaque)
    elif pixels.ndim == 3:
        values = pixels.max(-1)
        codes = pixels.astype(np.int32) @ (65536, 256, 1)
    if not opaque.all():
        # A photograph's own black is no background.
        if 1 < len(np.unique(codes[opaque])) <= FEW and not values[opaque].all():
            raise ValueError("it has transparent and black pixels; save it as grey PNG")
        return opaque, doubts
    mask, shades, soft = _object(values, codes)
    if soft:
        what = f"{shades} values: from half of the largest on it is object"
        doubts.append(("soft edge", what))
    elif shades > 1:
        doubts.append(("several values", f"{shades} besides 0, which count as one object"))
    return mask, doubts


def _channels(
    image: Image.Image,
) -> tuple[Shaped[np.ndarray, "H W ..."], UInt8[np.ndarray, "H W"] | None]:
    """An image's numbers, and how opaque each pixel is (0 to 255), where it says that."""
    mode = image.mode
    pixels = np.asarray(image)
    if mode in ("LA", "PA"):
        return pixels[..., 0], pixels[..., 1]
    if mode == "RGBA":
        return pixels[..., :3], pixels[..., 3]
    if mode not in (*GREY, "P", "RGB"):
        raise ValueError(f"its pixels are {mode}; save it as grey PNG")
    if mode == "F" and not np.isfinite(pixels).all():
        raise ValueError("it has values that are no numbers")
    if mode in ("I", "F") and pixels.min() < 0:
        raise ValueError("it has values below 0")
    clear = image.info.get("transparency")
    if clear is None:
        return pixels, None
    if mode == "P":
        table = np.full(256, 255, np.uint8)
        if isinstance(clear, bytes):
            table[: len(clear)] = list(clear[:256])
        else:
            table[clear] = 0
        return pixels, table[pixels]
    hidden = pixels == (bool(clear) if mode == "1" else clear)
    if mode == "RGB":
        hidden = hidden.all(-1)
    return pixels, np.where(hidden, 0, 255).astype(np.uint8)


def _palette_values(
    image: Image.Image, numbers: UInt8[np.ndarray, "H W"], opaque: Bool[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W"]:
    """0 where a palette says background, and a shade elsewhere."""
    palette = np.zeros((256, 3), np.uint8)
    given = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)[:256]
    palette[: len(given)] = given
    shades = palette.max(-1)
    used = np.flatnonzero(np.bincount(numbers[opaque], minlength=256))
    if shades[0] and not shades[used].all():
        # Black on white is as common as white on black; a hue is no background's.
        if opaque.all() and (palette[0] == shades[0]).all():
            raise ValueError(
                "number 0 of its palette is white or grey, and another one is black: "
                "either may be background; save it as grey PNG"
            )
        return shades[numbers]
    if shades[0] and opaque.all():
        raise ValueError("no colour of its palette is black; save it as grey PNG")
    grey = (palette[used] == shades[used, None]).all()
    # An object's number may be black, too, where the palette was cut short.
    table = np.maximum(shades, 1) if grey else np.arange(256, dtype=np.uint8)
    table[0] = shades[0]
    return table[numbers]


def _object(
    values: Shaped[np.ndarray, "H W"], codes: Shaped[np.ndarray, "H W"]
) -> tuple[Bool[np.ndarray, "H W"], int, bool]:
    """The object's pixels; how many different `codes` there are but 0; whether its edge is soft."""
    if values.dtype == bool:
        return values, 1, False
    if codes.dtype == np.uint8:
        shades = np.count_nonzero(np.bincount(codes.ravel())[1:])
    else:
        shades = np.count_nonzero(np.unique(codes))
    mask = values > 0
    largest = values.max()
    bright = values.dtype.kind != "u" or largest > np.iinfo(values.dtype).max // 2
    many = shades > FEW
    soft = (many and bright) or ((many or (shades > 2 and bright)) and not _has_areas(values))
    return (values >= largest / 2 if soft else mask), int(shades), bool(soft)


def _has_areas(values: Shaped[np.ndarray, "H W"]) -> bool:
    """Whether values between 0 and the largest fill areas, as of objects, and no mere edges."""
    inner = values[1:-1, 1:-1]
    alike = np.ones(inner.shape, bool)
    for beside in (values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:]):
        alike &= inner == beside
    between = (inner > 0) & (inner < values.max())
    return bool(10 * np.count_nonzero(alike & between) > np.count_nonzero(between))
