"""EXIF orientation as cameras and editors write it: pixels, masks and boxes, upright or stored."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lens_jax.data.sample import SampleError, orientation, read_image, to_rgb, turn, turn_box

ROOT = Path(__file__).parents[2]
# A placeable header and one of Windows.
WMF = (
    b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 100, 100, 72) + bytes(6)
    + b"\1\0\t\0" + bytes(30)
)  # fmt: skip
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def tiff(orientation=6, kind=3, count=1, entries=1):
    """A little-endian EXIF block of one directory, as cameras write it."""
    value = struct.pack("<HH", orientation, 0)
    entry = struct.pack("<HHI", 0x0112, kind, count) + value
    return b"II*\0" + struct.pack("<IH", 8, entries) + entry + b"\0" * 4


# -1/0 as an unsigned fraction beside the orientation: it cannot be written back.
FRACTION = (
    b"II*\0"
    + struct.pack("<IH", 8, 2)
    + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    + struct.pack("<HHII", 0x011A, 10, 1, 38)
    + b"\0" * 4
    + struct.pack("<ii", -1, 0)
)
BLOCKS = {
    "none": (None, 1),
    "empty": (b"", 1),
    "garbage": (b"\x01\x02garbage", 1),
    "cut": (tiff()[:14], 1),
    "far": (b"II*\0\xff\xff\xff\x7f", 1),
    "many entries": (tiff(entries=60000), 6),
    "turned": (tiff(), 6),
    "a second prefix": (b"Exif\0\0" + tiff(1), 1),
    "unwritable": (FRACTION, 6),
    "0": (tiff(0), 1),
    "9": (tiff(9), 1),
    "text": (tiff(0x36, kind=2, count=2), 1),
}


def jpeg(block):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG", quality=100, subsampling=0)
    content = file.getvalue()
    if block is None:
        return content
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    return content[:2] + segment + content[2:]


def png(kind, block, *, last=False):
    """With one more chunk before the pixels, or after them."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    content = file.getvalue()
    place = content.index(b"IEND" if last else b"IDAT") - 4
    chunk = struct.pack(">I", len(block)) + kind + block
    chunk += struct.pack(">I", zlib.crc32(kind + block))
    return content[:place] + chunk + content[place:]


@pytest.mark.parametrize("name", BLOCKS)
def test_no_block_makes_a_picture_unreadable(tmp_path, name):
    block, expected = BLOCKS[name]
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(block))
    assert orientation(file) == expected
    stored = read_image(file, pixels="stored")
    assert np.abs(stored.astype(int) - PIXELS).max() < 40
    np.testing.assert_array_equal(read_image(file), turn(stored, expected))


def test_blocks_of_png(tmp_path):
    file = tmp_path / "a.png"
    block = b"Exif\0\0" + tiff(8)
    profile = b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (len(block), block.hex().encode())
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation='x'/><b tiff:Orientation=\"3\"/>"
    for content, expected in (
        (png(b"eXIf", tiff(8)), 8),
        (png(b"eXIf", tiff(8), last=True), 8),
        (png(b"eXIf", b"abc"), 1),
        (png(b"tEXt", profile), 8),
        (png(b"tEXt", b"Raw profile type exif\0\n\nno\ndigits"), 1),
        (png(b"iTXt", xmp), 1),  # viewers turn by EXIF alone
    ):
        file.write_bytes(content)
        assert orientation(file) == expected
        np.testing.assert_array_equal(read_image(file, pixels="stored"), PIXELS)
        np.testing.assert_array_equal(read_image(file), turn(PIXELS, expected))


def test_tiff_is_turned_while_it_is_decoded(tmp_path):
    file = tmp_path / "a.tif"
    Image.fromarray(PIXELS).save(file, tiffinfo={0x0112: 6})
    assert orientation(file) == 1
    for pixels in ("upright", "stored"):
        np.testing.assert_array_equal(read_image(file, pixels=pixels), turn(PIXELS, 6))


@pytest.mark.parametrize("number", range(1, 9))
def test_pixels_masks_and_boxes_turn_alike(number):
    exif = Image.Exif()
    exif[0x0112] = number
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    np.testing.assert_array_equal(turn(PIXELS, number), expected)
    np.testing.assert_array_equal(to_rgb(Image.open(file)), expected)
    mask = np.zeros((5, 7), bool)
    mask[1:3, 2:6] = True
    x0, y0, x1, y1 = turn_box((2, 1, 6, 3), (5, 7), number).astype(int)
    around = np.zeros(expected.shape[:2], bool)
    around[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(turn(mask, number), around)
    assert turn(mask, number).flags.c_contiguous


def test_what_is_no_picture_has_no_orientation(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    for name in ("page.jpg", "missing.jpg", "."):
        with pytest.raises(SampleError):
            orientation(tmp_path / name)


def test_postscript_runs_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript is run"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(SampleError, match="PostScript is not read: convert it to PNG"):
        read_image(tmp_path / "a.eps")


def test_a_format_without_a_decoder_is_named(tmp_path):
    (tmp_path / "a.wmf").write_bytes(WMF)
    with pytest.raises(SampleError, match="a Windows metafile is not read: convert it to PNG"):
        read_image(tmp_path / "a.wmf")


@pytest.mark.parametrize(("bits", "said"), [(10, 1), (12, 1), (14, 1), (16, 0)])
def test_16_bit_grey_that_stays_dark_is_said_once(tmp_path, caplog, bits, said):
    values = np.linspace(0, 2**bits - 1, 100).astype(np.uint16).reshape(10, 10)
    Image.fromarray(values).save(tmp_path / "a.png")
    for _ in range(2):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], values >> 8)
    assert [str(tmp_path / "a.png") in x.message for x in caplog.records] == [True] * said


def test_damaged_blocks_print_nothing(tmp_path):
    """Pillow's warnings are no lines of a command."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    index = b"MPF\0II*\0\x08\0\0\0" + bytes(40)
    block = b"\xff\xe2" + struct.pack(">H", len(index) + 2) + index
    (tmp_path / "a.jpg").write_bytes(picture.getvalue()[:2] + block + picture.getvalue()[2:])
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    body = b"acTL" + struct.pack(">II", 0, 0)  # an animation of no frames
    chunk = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(picture.getvalue()[:33] + chunk + picture.getvalue()[33:])
    program = (
        "import pathlib, sys; from lens_jax.data.sample import read_image\n"
        "for name in sys.argv[1:]: print(read_image(pathlib.Path(name)).shape)"
    )
    files = [str(tmp_path / name) for name in ("a.jpg", "a.png")]
    ended = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, cwd=ROOT
    )
    assert ended.stdout.split("\n")[:2] == ["(8, 8, 3)"] * 2 and not ended.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC is not read: convert it to JPEG or PNG"),
        (b"<!doctype html>", "its content is of no known format"),
        (b"", "the file is empty"),
    ],
)
def test_what_is_no_picture_is_said_once(content, reason, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(SampleError) as error:
        read_image(tmp_path / "a.jpg")
    assert str(error.value) == f"{tmp_path / 'a.jpg'}: not a readable picture ({reason})"
