"""Pictures as programs hand them over: what is unambiguous is read, the rest refused."""

import io
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lens_jax.data.arrays import check_is_file, read_picture, to_picture
from lens_jax.data.sample import SampleError

RGB = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
GREY = RGB[..., 0]
CLEAR = np.full((24, 40, 1), 255, np.uint8)


def grey(pixels):
    return np.repeat(pixels[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (RGB, RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float16), RGB),
        ((RGB / 255).transpose(2, 0, 1), RGB),
        (RGB.astype(np.uint16) * 257, RGB),
        (np.concatenate([RGB, CLEAR], axis=2), RGB),
        (np.concatenate([RGB, CLEAR], axis=2).transpose(2, 0, 1), RGB),
        (np.concatenate([RGB, 0 * CLEAR], axis=2), np.full_like(RGB, 255)),
        (GREY, grey(GREY)),
        (GREY[..., None], grey(GREY)),
        (GREY[None], grey(GREY)),
        (GREY.astype(np.uint16) * 257, grey(GREY)),
        ((GREY.astype(np.uint16) * 257).astype(">u2"), grey(GREY)),
        ((GREY > 99).astype(ml_dtypes.bfloat16), grey((GREY > 99) * np.uint8(255))),
        (GREY > 99, grey((GREY > 99) * np.uint8(255))),
        (np.zeros((8, 9), np.uint16), np.zeros((8, 9, 3), np.uint8)),
        (np.ones((8, 9), np.float32), np.full((8, 9, 3), 255, np.uint8)),
    ],
)
def test_an_array_is_the_picture_that_it_shows(array, wanted):
    picture = to_picture(array)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, wanted)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (RGB.astype(np.float32), "0 to 1"),
        (RGB / 127.5 - 1, "0 to 1"),
        (np.where(GREY > 9, np.nan, 0.5), "not a number"),
        (RGB.astype(np.uint16), "8, 10, 12, 14 or 16 bits"),
        *((RGB.astype(np.uint16) << n, "8, 10, 12, 14 or 16 bits") for n in range(1, 8)),
        *((RGB[:n, :, :m], "first axis or the last") for n in (1, 3, 4) for m in (1, 3)),
        (RGB[:, :3].transpose(2, 0, 1), "first axis or the last"),
        (RGB[:, :4].transpose(2, 0, 1), "first axis or the last"),
        (RGB.astype(np.int64), "uint8"),
        (RGB.astype(np.complex64), "uint8"),
        (RGB.astype(object), "object is no picture: give uint8"),
        (np.zeros((4, 5), "M8[s]"), "is no picture: give uint8"),
        (RGB[None], "(1, 24, 40, 3)"),
        (RGB[..., :2], "(24, 40, 2)"),
        (RGB[0, 0], "(3,)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        ([[0, 1], [2, 3]], "not list: make it one with numpy.array"),
        (None, "not NoneType"),
        ("", "path of the picture is empty"),
        (b"\x89PNG", "not bytes: read it with PIL.Image.open(io.BytesIO(...))"),
        (io.BytesIO(b"\x89PNG"), "not BytesIO: read it with PIL.Image.open"),
    ],
)
def test_what_may_be_meant_in_several_ways_is_refused(array, reason):
    with pytest.raises(ValueError) as error:
        to_picture(array)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_files_and_images(tmp_path):
    """Upright, as a viewer shows them; whatever Pillow raises is one kind of error."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "side.png"
    Image.fromarray(RGB).save(file, exif=exif)
    upright = np.rot90(RGB, -1)
    with Image.open(file) as image:
        for given in (file, str(file), image):
            np.testing.assert_array_equal(to_picture(given), upright)
    cut = tmp_path / "cut.png"
    cut.write_bytes(file.read_bytes()[:200])
    for given in (cut, Image.open(cut), tmp_path / "none.png", Image.new("F", (4, 4))):
        with pytest.raises(ValueError):
            to_picture(given)


def test_only_regular_files_are_read(tmp_path):
    """Opening a pipe would wait for a writer that never comes."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    wrong = {
        "folder.png": "a folder",
        "pipe.png": "a pipe",
        "loop.png": "cannot be opened",
        "none.png": "no such picture",
        "nul\0.png": "no file has such a name",
        "\ud800.png": "no file has such a name",
        "a" * 300: "cannot be opened",
        "http://localhost/a.png": "an address",
        "data:image/png;base64," + "A" * 5000: "an address",
    }
    for name, reason in wrong.items():
        with pytest.raises(SampleError, match=reason) as error:
            read_picture(tmp_path / name)
        assert len(str(error.value)) < 400 + len(str(tmp_path))
    with pytest.raises(SampleError, match="no such picture"):
        check_is_file(Path("C:/pictures/a.png"))


def test_several_pictures_are_sent_to_segment_batch():
    with pytest.raises(ValueError, match=r"holds 1 pictures?: .* segment_batch"):
        to_picture(np.zeros((1, 8, 8, 3), np.uint8))
