"""The pixel rule of data/images.py: one test a format, on pixels known without running the code."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_pretrain.data import images
from ssl_pretrain.data.images import UnreadableImage, decode

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
COLOUR = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
SMOOTH = np.kron(RANDOM.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))  # survives JPEG


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_colour_is_kept_and_can_be_written_to():
    pixels = decode(encoded(Image.fromarray(COLOUR), "PNG"), "a.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOUR)
    pixels[0, 0] = 0


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_grey_is_repeated(format):
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(GREY), format), "a"), np.repeat(GREY[..., None], 3, axis=2))


def test_one_bit_is_black_and_white():
    pixels = decode(encoded(Image.fromarray(GREY > 127), "PNG"), "a.png")
    np.testing.assert_array_equal(pixels, np.repeat(np.where(GREY > 127, 255, 0)[..., None], 3, axis=2))


def test_palette_gives_its_colours():
    image = Image.fromarray(GREY % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.arange(10, 130, 10).reshape(4, 3)[GREY % 4]
    np.testing.assert_array_equal(decode(encoded(image, "PNG"), "a.png"), expected)
    np.testing.assert_array_equal(decode(encoded(image, "GIF"), "a.gif"), expected)


def test_transparent_palette_entry_becomes_black():
    image = Image.fromarray(GREY % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.array([[10, 20, 30], [40, 50, 60], [0, 0, 0], [100, 110, 120]])[GREY % 4]
    np.testing.assert_array_equal(decode(encoded(image, "PNG", transparency=2), "a.png"), expected)


def test_colour_marked_transparent_becomes_black():
    pixels = COLOUR.copy()
    pixels[0, 0] = pixels[2, 3] = (1, 2, 3)
    expected = pixels.copy()
    expected[0, 0] = expected[2, 3] = 0
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3)), "a.png"), expected)


def test_alpha_is_composited_on_black():
    alpha = np.array([[0, 51, 255]], np.uint8)
    colour = np.full((1, 3, 3), 200, np.uint8)
    expected = np.repeat(np.array([[0, 40, 200]], np.uint8)[..., None], 3, axis=2)  # 200 * 51 / 255 = 40
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(np.dstack([colour, alpha])), "PNG"), "a.png"), expected)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(np.dstack([colour[..., 0], alpha])), "PNG"), "a.png"), expected)


def test_16_bit_grey_is_divided_by_257():
    values = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 1, 128, 254, 255, 255]])[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values), "PNG"), "a.png"), expected)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(values), "TIFF"), "a.tif"), expected)
    pgm = b"P5 8 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm, "a.pgm"), expected)


def test_16_bit_colour_is_within_one_level():
    values = RANDOM.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)  # by hand: Pillow writes no such PNG

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = block(b"IHDR", struct.pack(">IIBBBBB", 6, 4, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + start + block(b"IDAT", zlib.compress(rows)) + block(b"IEND", b"")
    assert np.abs(decode(png, "a.png").astype(float) - values / 257).max() <= 1


def test_cmyk_is_converted():
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan, no ink else
    pixels = decode(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"), "a.tif")
    np.testing.assert_array_equal(pixels, np.broadcast_to([0, 255, 255], (8, 8, 3)))
    jpeg = decode(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG"), "a.jpg")
    assert np.abs(jpeg.astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    # what each value says: where the stored first row and first column are, in the upright image
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation](SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    pixels = decode(encoded(Image.fromarray(SMOOTH), format, exif=exif, **options), "a")
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_quick_way_of_jpeg_is_pillows_to_the_bit(mode, progressive):
    inks = Image.fromarray(np.dstack([SMOOTH, SMOOTH[::-1, :, 0]]), "CMYK")
    content = encoded(inks if mode == "CMYK" else Image.fromarray(SMOOTH).convert(mode), "JPEG", progressive=progressive)
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(decode(content, "a.jpg"), np.array(image.convert("RGB")))


def test_one_pixel():
    assert decode(encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), "a.png").tolist() == [[[1, 2, 3]]]
    assert decode(encoded(Image.new("L", (1, 1), 9), "JPEG"), "a.jpg").shape == (1, 1, 3)


def test_first_of_several_frames():
    frames = [Image.new("L", (3, 2), value) for value in (10, 200)]
    assert (decode(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), "a.tif") == 10).all()


def damaged() -> dict[str, tuple[bytes, str]]:
    png, jpeg = encoded(Image.fromarray(COLOUR), "PNG"), encoded(Image.fromarray(SMOOTH), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "empty": (b"", "a.png: the file is empty"),
        "a text": (b"not an image, though it is called one", "a.png: no known image format"),
        "a truncated JPEG": (jpeg[: len(jpeg) // 2], "a.png: "),
        "a truncated PNG": (png[: len(png) // 2], "a.png: "),
        "a flipped byte in a PNG": (bytes(flipped), "a.png: "),
        "floats": (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "a.png: pixels of mode F have no agreed conversion to RGB"),
        "32 bits": (encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "a.png: 32-bit integers have no agreed range"),
    }


@pytest.mark.parametrize("case", damaged())
def test_what_cannot_be_read_is_named(case):
    content, message = damaged()[case]
    with pytest.raises(UnreadableImage) as caught:
        decode(content, "a.png")
    assert str(caught.value).startswith(message)


def test_header_reads_no_pixels():
    content = encoded(Image.fromarray(COLOUR), "PNG")
    assert images.header(content[:60], "a.png") == ("RGB", 7, 5)
