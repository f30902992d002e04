"""Uploaded images are decoded as offline, or refused before they cost memory or time."""

import io
import struct
import threading
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_pretrain.data import images
from ssl_pretrain.data.pixels import RGB, PixelFormat
from ssl_pretrain.eval.serving.image_checks import ImageDecoder
from ssl_pretrain.eval.serving.refusals import Refusal

LIMIT = 1_000_000
VIEWER = "Open it in an image viewer, save it again, and send that copy."
SMALLER = "Send a smaller copy, or start the service with a larger --max-pixels."


def decode(content: bytes, pixel_format=RGB) -> np.ndarray:
    return ImageDecoder(pixel_format, LIMIT).decode(content, "image")


def refusal_of(content: bytes, pixel_format=RGB) -> Refusal:
    """Return the refusal of an image, which must take little memory and time."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(Refusal) as refusal:
            decode(content, pixel_format)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000 + 3 * len(content)
    assert time.perf_counter() - start < 20  # not the minutes or hours of the full decoding
    return refusal.value


def save(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(mode="RGB", size=(48, 32)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(photo(), "JPEG", exif=exif)


def sixteen_bit_png() -> bytes:
    values = np.random.default_rng(0).integers(0, 65536, (32, 48), dtype=np.uint16)
    return save(Image.fromarray(values), "PNG")


def transparent_palette() -> bytes:
    return save(photo("P"), "GIF", transparency=3)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(photo()))
    return file.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


INTERLEAVED = {"planarconfig": "contig", "photometric": "minisblack"}


@pytest.fixture
def no_imagecodecs(monkeypatch):
    name = "ssl_pretrain.eval.serving.image_checks.is_installed"
    monkeypatch.setattr(name, lambda package: False)


ACCEPTED = {
    "JPEG": lambda: save(photo(), "JPEG"),
    "progressive JPEG": lambda: save(photo(), "JPEG", progressive=True),
    "CMYK JPEG": lambda: save(photo("CMYK"), "JPEG"),
    "gray JPEG": lambda: save(photo("L"), "JPEG"),
    **{f"JPEG with orientation {turn}": lambda turn=turn: rotated_jpeg(turn) for turn in (3, 6, 8)},
    "PNG": lambda: save(photo(), "PNG"),
    "palette PNG": lambda: save(photo("P"), "PNG"),
    "1-bit PNG": lambda: save(photo("1"), "PNG"),
    "PNG with alpha": lambda: save(photo("RGBA"), "PNG"),
    "16-bit PNG": sixteen_bit_png,
    "GIF": lambda: save(photo("P"), "GIF"),
    "transparent GIF": transparent_palette,
    "WebP": lambda: save(photo(), "WEBP"),
    "lossless WebP": lambda: save(photo(), "WEBP", lossless=True),
    "WebP with alpha": lambda: save(photo("RGBA"), "WEBP"),
    "BMP": lambda: save(photo(), "BMP"),
    "TIFF": lambda: save(photo(), "TIFF"),
    "deflated TIFF": lambda: save(photo(), "TIFF", compression="tiff_deflate"),
    "PPM": lambda: save(photo(), "PPM"),
    "npy": npy,
    "1 x 1 PNG": lambda: save(photo(size=(1, 1)), "PNG"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_every_format_is_decoded_as_offline(name):
    content = ACCEPTED[name]()
    np.testing.assert_array_equal(decode(content), images.decode(content, "image", RGB))


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_bands_are_decoded_as_offline(compression):
    bands = np.random.default_rng(0).integers(0, 256, (32, 48, 5), dtype=np.uint8)
    content = tiff(bands, compression=compression, **INTERLEAVED)
    five = PixelFormat(5)
    np.testing.assert_array_equal(decode(content, five), bands)


def test_wrong_channels_are_refused_as_offline():
    refusal = refusal_of(save(photo(), "PNG"), PixelFormat(5))
    assert refusal.status == 422
    assert refusal.error == (
        "image: cannot be read as an image: image has 3 channels, and data.channels is 5; set "
        "data.channels=3 if all images have that many."
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"%PDF-1.7 ...", " It looks like a PDF."),
        (b"PK\x03\x04....", " It looks like a zip archive."),
        (b'  {"image": "..."}', " It looks like JSON."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", " It looks like an SVG."),
        (b"<!DOCTYPE html><html>", " It looks like an HTML page."),
        (b"data:image/png;base64,iVBO", " It looks like a data URL."),
        (b"%!PS-Adobe-3.0 EPSF-3.0", ""),
        (b"\x00" * 100, ""),
    ],
)
def test_what_is_no_image_is_named(content, found):
    refusal = refusal_of(content)
    assert refusal.status == 415
    assert refusal.error == f"image: is not a known image format.{found}"
    assert refusal.remedy == "Send JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF, PNM or .npy."


def test_an_empty_file_is_named():
    refusal = refusal_of(b"")
    assert (refusal.status, refusal.error) == (422, "image: is empty.")


@pytest.mark.parametrize("name", [name for name in ACCEPTED if name != "1 x 1 PNG"])
def test_half_a_file_is_refused_or_read_as_offline(name):
    content = ACCEPTED[name]()
    half = content[: len(content) // 2]
    try:
        expected = images.decode(half, "image", RGB)
    except images.UnreadableImage:
        refusal = refusal_of(half)
        assert refusal.status == 422
        assert refusal.error.startswith("image: cannot be read as an image: ")
        assert refusal.remedy == VIEWER
    else:
        np.testing.assert_array_equal(decode(half), expected)


def png_header(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def huge_webp() -> bytes:
    size = (16383).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size
    return b"RIFF" + struct.pack("<I", len(extended) + 4) + b"WEBP" + extended


def huge_lossless_webp() -> bytes:
    data = b"\x2f" + (16383 | 16383 << 14).to_bytes(4, "little") + bytes(20)
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunk) + 4) + b"WEBP" + chunk


def huge_jpeg() -> bytes:
    content = bytearray(save(photo(), "JPEG"))
    position = content.index(b"\xff\xc0") + 5
    content[position : position + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(content)


def huge_gif() -> bytes:
    content = bytearray(save(photo("P"), "GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


def huge_bmp() -> bytes:
    content = bytearray(save(photo(), "BMP"))
    content[18:26] = struct.pack("<ii", 40_000, 40_000)
    return bytes(content)


def huge_tiff() -> bytes:
    content = bytearray(tiff(np.zeros((8, 8), np.uint8)))
    page = tifffile.TiffFile(io.BytesIO(bytes(content))).pages[0]
    for code in (256, 257):
        offset = page.tags[code].valueoffset
        size = 4 if page.tags[code].dtype == 4 else 2
        content[offset : offset + size] = (60_000).to_bytes(size, "little")
    return bytes(content)


HUGE = {
    "PNG": (lambda: png_header(60_000, 60_000, (b"IDAT", b"")), "60,000 x 60,000"),
    "WebP": (huge_webp, "16,384 x 16,384"),
    "lossless WebP": (huge_lossless_webp, "16,384 x 16,384"),
    "JPEG": (huge_jpeg, "65,500 x 65,500"),
    "TIFF": (huge_tiff, "60,000 x 60,000"),
    "PPM": (lambda: b"P6 9000 9000 255\n" + bytes(100), "9,000 x 9,000"),
}


@pytest.mark.parametrize("name", HUGE)
def test_more_pixels_than_the_limit_are_refused_before_decoding(name):
    make, size = HUGE[name]
    refusal = refusal_of(make())
    assert refusal.status == 413
    assert refusal.error == f"image: {size} pixels exceed the limit of 1,000,000."
    assert refusal.remedy == SMALLER


def test_a_size_that_libjpeg_does_not_read_is_not_taken_for_that_of_a_jpeg():
    content = save(photo(size=(2000, 2000)), "JPEG")
    scan = content.index(b"\xff\xda")
    headers, rest = content[2:scan], content[scan:]
    small = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 1, 1, 1) + b"\x01\x11\0"
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(small)) + small
    length = struct.pack(">H", 2 + len(headers) + 4)  # would end in the comment
    hidden = b"\xff\xd8\xff\x00" + length + headers + comment + rest
    assert images.jpeg_size(hidden) == (0, 0)
    refusal = refusal_of(hidden)
    assert refusal.status == 413
    assert refusal.error == "image: 2,000 x 2,000 pixels exceed the limit of 1,000,000."


def test_a_png_must_begin_with_its_header():
    content = save(photo(size=(2000, 2000)), "PNG")
    data = struct.pack(">II", 1, 1)
    chunk = struct.pack(">I", len(data)) + b"prVt" + data
    chunk += struct.pack(">I", zlib.crc32(b"prVt" + data))
    hidden = content[:8] + chunk + content[8:]
    refusal = refusal_of(hidden)
    assert refusal.status == 422
    assert refusal.error == ("image: cannot be read as an image: the PNG does not begin with IHDR.")
    with pytest.raises(images.UnreadableImage) as error:
        images.decode(hidden, "image")
    assert str(error.value) == "image: the PNG does not begin with IHDR"


@pytest.mark.parametrize("make", [huge_gif, huge_bmp])
def test_sizes_beyond_pillows_own_limit_are_refused(make):
    refusal = refusal_of(make())
    assert refusal.status == 413
    assert refusal.error == "image: its pixels exceed the limit of 178,956,970."


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_text_that_unpacks_to_many_megabytes_is_not_unpacked(kind):
    packed = zlib.compress(bytes(30_000_000), 9)
    pixels = zlib.compress(b"".join(b"\0" + bytes(3 * 8) for _ in range(8)))
    content = png_header(8, 8, (kind, b"key\0\0" + packed), (b"IDAT", pixels))
    tracemalloc.start()
    try:
        try:
            decode(content)
        except Refusal as refusal:
            assert refusal.status == 422
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_a_thousand_scans_is_refused():
    content = save(photo(), "JPEG", progressive=True)
    start = content.index(b"\xff\xda")
    scan = content[start : content.index(b"\xff", start + 2)]
    refusal = refusal_of(content[:start] + scan * 1000 + content[start:])
    assert refusal.status == 422
    assert refusal.error == (
        "image: cannot be read as an image: the JPEG has 1,010 scans, more than the limit of 100."
    )


@pytest.mark.parametrize("place", ["after the image", "in a header"])
def test_only_the_scans_of_the_first_image_count(place):
    content, others = save(photo(), "JPEG"), b"\xff\xda" * 200
    if place == "after the image":  # such as the film of a phone
        content += others
    else:  # such as a thumbnail
        content = content[:2] + b"\xff\xe5" + struct.pack(">H", 402) + others + content[2:]
    np.testing.assert_array_equal(decode(content), images.decode(content, "image", RGB))


def test_scans_cannot_hide_behind_a_marker_without_a_length():
    content = save(photo(), "JPEG")
    start = content.index(b"\xff\xda")
    scans = b"\xff\x02\xff\xff" + content[start : start + 20] * 200
    refusal = refusal_of(content[:start] + scans + content[start:])
    assert refusal.error.endswith("the JPEG has 201 scans, more than the limit of 100.")


def test_a_tiff_of_many_pages_is_refused():
    refusal = refusal_of(tiff(np.zeros((100, 4, 4), np.uint8), photometric="minisblack"))
    assert refusal.status == 422
    assert refusal.error == ("image: cannot be read as an image: the TIFF has more than 64 pages.")


def test_a_tiff_whose_pages_form_a_circle_is_refused():
    header = b"II*\0" + struct.pack("<I", 8)
    page = struct.pack("<H", 0) + struct.pack("<I", 8)  # the next page is this one
    assert refusal_of(header + page).status == 422


def test_the_pages_of_a_tiff_count_together():
    refusal = refusal_of(tiff(np.zeros((5, 500, 500), np.uint8)), PixelFormat(5))
    assert refusal.status == 413
    assert refusal.error == ("image: 500 x 500 pixels in 5 pages exceed the limit of 1,000,000.")


def test_wide_pixels_count_by_their_bytes():
    bands = np.zeros((40, 40, 32))
    content = tiff(bands, compression="deflate", **INTERLEAVED)
    decoder = ImageDecoder(PixelFormat(32), max_pixels=100_000)
    with pytest.raises(Refusal) as refusal:
        decoder.decode(content, "image")
    assert refusal.value.status == 413
    assert refusal.value.error == (
        "image: 40 x 40 pixels of 256 bytes exceed the limit of 100,000 pixels of 4 bytes."
    )
    file = io.BytesIO()
    np.save(file, bands)
    with pytest.raises(Refusal, match=r"40 x 40 pixels of 256 bytes exceed"):
        decoder.decode(file.getvalue(), "image")


def test_a_tile_that_exceeds_the_image_counts_in_full():
    content = bytearray(tiff(np.zeros((8, 8, 5), np.uint8), tile=(16, 16), **INTERLEAVED))
    page = tifffile.TiffFile(io.BytesIO(bytes(content))).pages[0]
    for code in (322, 323):
        size = 4 if page.tags[code].dtype == 4 else 2
        offset = page.tags[code].valueoffset
        content[offset : offset + size] = (16_000).to_bytes(size, "little")
    refusal = refusal_of(bytes(content), PixelFormat(5))
    assert refusal.status == 413
    assert refusal.error.startswith("image: 8 x 8 pixels of 20,000,000 bytes exceed the limit")


def test_a_tile_at_the_edge_may_exceed_the_image(no_imagecodecs):
    bands = np.random.default_rng(0).integers(0, 256, (10, 12, 5), dtype=np.uint8)
    content = tiff(bands, tile=(16, 16), compression="deflate", **INTERLEAVED)
    np.testing.assert_array_equal(decode(content, PixelFormat(5)), bands)


def test_more_segments_than_the_image_needs_are_refused():
    content = bytearray(
        tiff(np.zeros((64, 64, 5), np.uint8), tile=(16, 16), compression="deflate", **INTERLEAVED)
    )
    page = tifffile.TiffFile(io.BytesIO(bytes(content))).pages[0]
    for code in (256, 257):  # 4 of the 16 tiles are enough for 32 x 32 pixels
        size = 4 if page.tags[code].dtype == 4 else 2
        offset = page.tags[code].valueoffset
        content[offset : offset + size] = (32).to_bytes(size, "little")
    refusal = refusal_of(bytes(content), PixelFormat(5))
    assert refusal.status == 422
    assert refusal.error == (
        "image: cannot be read as an image: a page of the TIFF has 16 segments, and its size "
        "needs 4."
    )


def test_a_strip_that_unpacks_to_more_than_its_share_is_refused(no_imagecodecs):
    bands = np.zeros((32, 32, 5), np.uint8)
    content = bytearray(tiff(bands, rowsperstrip=8, compression="deflate", **INTERLEAVED))
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as file:
        page = file.pages[0]
        offset_tag, count_tag = page.tags[273], page.tags[279]
    bomb = zlib.compress(bytes(32 * 32 * 5), 9)  # the size of the whole image
    start, size = offset_tag.valueoffset, 4 if count_tag.dtype == 4 else 2
    content[start : start + 4] = len(content).to_bytes(4, "little")
    start = count_tag.valueoffset
    content[start : start + size] = len(bomb).to_bytes(size, "little")
    refusal = refusal_of(bytes(content) + bomb, PixelFormat(5))
    assert refusal.status == 422
    assert refusal.error.endswith("a segment of the TIFF inflates to more than its 1,280 bytes.")


def test_images_that_exceed_the_memory_together_are_decoded_one_after_another(monkeypatch):
    decoder = ImageDecoder(RGB, max_pixels=48 * 32)
    running, most = 0, 0
    lock = threading.Lock()

    def decode_slowly(content, name, pixel_format):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    monkeypatch.setattr(images, "decode", decode_slowly)
    content = save(photo(), "PNG")
    threads = [threading.Thread(target=decoder.decode, args=(content, "image")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
