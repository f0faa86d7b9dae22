"""Masks as picture files: what is object in each kind of them, and what is refused or doubtful."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lens_jax.data.mask_files import read_mask

HEIGHT, WIDTH = 40, 56
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[8:30, 10:40] = True
ON = MASK.astype(np.uint8)
GREY = Image.fromarray(ON * 255)
PHOTO = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
PHOTO[10:14, 12:20] = 0  # black in the middle of the object
BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (200, 0, 0), (0, 0, 200)


def palette(numbers, *colours):
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def stack(*channels):
    return Image.fromarray(np.dstack(channels))


def soft(size=(WIDTH, HEIGHT)):
    """A square that was drawn larger, and its edge smoothed: a handful of values."""
    large = Image.fromarray(np.kron(ON, np.full((4, 4), 255, np.uint8)))
    return large.resize(size, Image.Resampling.BICUBIC)


READ = {
    "grey255.png": GREY,
    "grey1.png": Image.fromarray(ON),
    "bilevel.png": GREY.convert("1"),
    "fax.tif": (GREY.convert("1"), {"compression": "group4"}),
    "grey16.png": Image.fromarray(ON.astype(np.uint16) * 700),
    "grey32.tif": Image.fromarray(ON.astype(np.int32) * 70_000),
    "float.tif": Image.fromarray(ON.astype(np.float32)),
    "grey.bmp": GREY,
    "bilevel.bmp": GREY.convert("1"),
    "plain.pgm": GREY,
    "lossless.webp": (GREY.convert("RGB"), {"lossless": True}),
    "reversible.jp2": (GREY, {"irreversible": False}),
    "grey.gif": GREY,
    # DAVIS and VOC: a number is an object, and the palette is for the eye.
    "davis.png": palette(ON, BLACK, RED),
    "voc.png": palette(ON * 15, BLACK, *[RED] * 15, *[BLACK] * 200),
    "short palette.png": palette(ON * 3, BLACK),
    # Editors number colours as they come.
    "swapped colour.png": palette(np.where(MASK, 0, 2), RED, WHITE, BLACK),
    "clear number.png": (palette(np.where(MASK, 1, 2), BLACK, WHITE, BLUE), {"transparency": 2}),
    "clear first.png": (palette(ON, WHITE, BLACK), {"transparency": 0}),
    "clear grey.png": (Image.fromarray(np.where(MASK, 0, 7).astype(np.uint8)), {"transparency": 7}),
    "clear colour.png": (
        Image.fromarray(np.where(MASK[..., None], BLACK, WHITE).astype(np.uint8)),
        {"transparency": WHITE},
    ),
    "colour.png": stack(ON * 0, ON * 9, ON * 0),
    "opaque.png": stack(ON * 255, ON * 255, ON * 255, ON * 0 + 255),
    "silhouette.png": stack(ON * 0, ON * 0, ON * 0, ON * 255),
    "grey alpha.png": stack(ON * 255, ON * 255),
    "cut out of a photograph.png": stack(PHOTO, ON * 255),
}


@pytest.mark.parametrize("name", READ)
def test_the_object_is_what_its_writer_meant(name, tmp_path):
    image, options = READ[name] if isinstance(READ[name], tuple) else (READ[name], {})
    image.save(tmp_path / name, **options)
    found = read_mask(tmp_path / name)
    assert found.mask.dtype == bool and not found.doubts
    np.testing.assert_array_equal(found.mask, MASK)


REFUSED = {
    "plain.jpg": (GREY, {}, "JPEG blurs"),
    "a jpeg.png": (GREY, {"format": "JPEG"}, "JPEG blurs"),
    "lossy.webp": (GREY.convert("RGB"), {"quality": 90}, "WEBP blurs"),
    "lossy alpha.webp": (Image.merge("RGBA", [GREY] * 4), {"quality": 90}, "WEBP blurs"),
    "lossy.jp2": (GREY, {"irreversible": True, "quality_layers": [40]}, "JPEG2000 blurs"),
    "jpeg.tif": (GREY, {"compression": "jpeg"}, "TIFF blurs"),
    "two.gif": (GREY, {"save_all": True, "append_images": [soft()]}, "2 frames"),
    "cmyk.tif": (GREY.convert("CMYK"), {}, "CMYK; save it as grey PNG"),
    "no black.png": (palette(ON, WHITE, RED), {}, "no colour of its palette is black"),
    # Black on white, or white on black.
    "swapped.png": (palette(1 - ON, WHITE, BLACK), {}, "either may be background"),
    "drawn.png": (palette(ON, WHITE, BLACK), {}, "either may be background"),
    "drawn and red.png": (palette(ON * 2, WHITE, RED, BLACK), {}, "either may be background"),
    "an icon.ico": (GREY, {"sizes": [(16, 16)]}, "masks in ICO are not read"),
    "a texture.dds": (GREY.convert("RGB"), {}, "masks in DDS are not read"),
    "two backgrounds.png": (
        stack(ON * 255, ON * 255, ON * 255, np.pad(ON[:, 4:] * 0 + 255, ((0, 0), (4, 0)))),
        {},
        "transparent and black",
    ),
    "negative.tif": (Image.fromarray(ON.astype(np.int32) - 1), {}, "below 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_blurs_or_has_two_readings_is_refused(name, tmp_path):
    image, options, message = REFUSED[name]
    image.save(tmp_path / name, **options)
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / name)


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    GREY.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:70])
    for name in ("text.png", "cut.png"):
        with pytest.raises(ValueError):
            read_mask(tmp_path / name)


def test_a_soft_edge_is_cut_at_half(tmp_path):
    disc = Image.new("L", (400, 400))
    ImageDraw.Draw(disc).ellipse((50, 50, 300, 300), fill=255)
    disc = disc.resize((100, 100), Image.Resampling.LANCZOS)
    cases = {
        "few values.png": (soft(), MASK),
        "many values.png": (disc, np.asarray(disc) >= 128),
        "grey palette.png": (soft().convert("P"), MASK),
        "alpha.png": (Image.merge("LA", [disc.point(lambda _: 255), disc]), None),
        "colour.png": (Image.merge("RGB", [disc, disc.point(lambda _: 0), disc]), None),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        found = read_mask(tmp_path / name)
        expected = np.asarray(disc) >= 128 if expected is None else expected
        np.testing.assert_array_equal(found.mask, expected, err_msg=name)
        assert [kind for kind, _ in found.doubts] == ["soft edge"], name


def test_several_objects_count_as_one_and_are_doubtful(tmp_path):
    numbers = ON.copy()
    numbers[8:20] *= 2
    images = {
        "numbers.png": Image.fromarray(numbers),
        "palette.png": palette(numbers, BLACK, RED, BLUE),
        "colours.png": palette(numbers, BLACK, RED, BLUE).convert("RGB"),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        found = read_mask(tmp_path / name)
        np.testing.assert_array_equal(found.mask, MASK, err_msg=name)
        assert found.doubts == (("several values", "2 besides 0, which count as one object"),)
    many = (np.arange(WIDTH) // 3 + 1).astype(np.uint8) * ON  # numbers of instances
    for name, scale in (("instances.png", 1), ("void.png", 13)):
        pixels = many * np.uint8(scale)
        Image.fromarray(np.where(pixels > 100, 255, pixels) if scale > 1 else pixels).save(
            tmp_path / name
        )
        found = read_mask(tmp_path / name)
        np.testing.assert_array_equal(found.mask, MASK)
        assert [kind for kind, _ in found.doubts] == ["several values"]


def test_a_mask_is_turned_as_its_own_file_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(ON)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png").mask, MASK)
