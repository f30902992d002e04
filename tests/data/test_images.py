"""Pixels decoded by data/images.py: one test per format, on pixels known without running code."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssl_pretrain.data import images
from ssl_pretrain.data.images import UnreadableImage, decode
from ssl_pretrain.data.pixels import PixelFormat

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
# Large squares, which a JPEG hardly changes.
SMOOTH = np.kron(RNG.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_rgb_pixels_are_unchanged_and_writable():
    pixels = decode(encode(Image.fromarray(COLOR), "PNG"), "a.png")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, COLOR)
    pixels[0, 0] = 0


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_gray_is_repeated_in_three_channels(format):
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(GRAY), format), "a"), np.repeat(GRAY[..., None], 3, axis=2)
    )


def test_one_bit_images_are_black_and_white():
    pixels = decode(encode(Image.fromarray(GRAY > 127), "PNG"), "a.png")
    np.testing.assert_array_equal(
        pixels, np.repeat(np.where(GRAY > 127, 255, 0)[..., None], 3, axis=2)
    )


def test_palette_indices_become_the_palettes_colors():
    image = Image.fromarray(GRAY % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.arange(10, 130, 10).reshape(4, 3)[GRAY % 4]
    np.testing.assert_array_equal(decode(encode(image, "PNG"), "a.png"), expected)
    np.testing.assert_array_equal(decode(encode(image, "GIF"), "a.gif"), expected)


def test_a_transparent_palette_entry_becomes_black():
    image = Image.fromarray(GRAY % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.array([[10, 20, 30], [40, 50, 60], [0, 0, 0], [100, 110, 120]])[GRAY % 4]
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=2), "a.png"), expected)


def test_a_color_marked_transparent_becomes_black():
    pixels = COLOR.copy()
    pixels[0, 0] = pixels[2, 3] = (1, 2, 3)
    expected = pixels.copy()
    expected[0, 0] = expected[2, 3] = 0
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3)), "a.png"), expected
    )


def test_alpha_is_composited_on_black():
    alpha = np.array([[0, 51, 255]], np.uint8)
    color = np.full((1, 3, 3), 200, np.uint8)
    # 200 * 51 / 255 = 40
    expected = np.repeat(np.array([[0, 40, 200]], np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(np.dstack([color, alpha])), "PNG"), "a.png"), expected
    )
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(np.dstack([color[..., 0], alpha])), "PNG"), "a.png"),
        expected,
    )


def test_16_bit_gray_is_divided_by_257():
    values = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
    expected = np.repeat(np.array([[0, 0, 1, 1, 128, 254, 255, 255]])[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(values), "PNG"), "a.png"), expected)
    np.testing.assert_array_equal(
        decode(encode(Image.fromarray(values), "TIFF"), "a.tif"), expected
    )
    pgm = b"P5 8 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm, "a.pgm"), expected)


def test_16_bit_color_is_within_one_level():
    values = RNG.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
    pixels = decode(encode_16_bit_png(values), "a.png")
    assert np.abs(pixels.astype(float) - values / 257).max() <= 1


def test_cmyk_is_converted():
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan, no other ink
    pixels = decode(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"), "a.tif")
    np.testing.assert_array_equal(pixels, np.broadcast_to([0, 255, 255], (8, 8, 3)))
    jpeg = decode(encode(Image.fromarray(cmyk, "CMYK"), "JPEG"), "a.jpg")
    assert np.abs(jpeg.astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format, orientation):
    # Each value says where the first stored row and column are in the upright image.
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
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    content = encode(Image.fromarray(SMOOTH), format, exif=exif, **options.get(format, {}))
    pixels = decode(content, "a")
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_fast_jpeg_decoder_equals_pillow(mode, progressive):
    cmyk = Image.fromarray(np.dstack([SMOOTH, SMOOTH[::-1, :, 0]]), "CMYK")
    content = encode(
        cmyk if mode == "CMYK" else Image.fromarray(SMOOTH).convert(mode),
        "JPEG",
        progressive=progressive,
    )
    with Image.open(io.BytesIO(content)) as image:
        np.testing.assert_array_equal(decode(content, "a.jpg"), np.array(image.convert("RGB")))


def test_an_image_may_have_one_pixel():
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), "a.png").tolist() == [
        [[1, 2, 3]]
    ]
    assert decode(encode(Image.new("L", (1, 1), 9), "JPEG"), "a.jpg").shape == (1, 1, 3)


def test_the_first_of_several_frames_is_read():
    frames = [Image.new("L", (3, 2), value) for value in (10, 200)]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(content, "a.gif") == 10).all()
    assert images.read_header(content, "a.gif").num_frames == 2


def test_smaller_copies_in_a_tiff_are_ignored():
    large, small = Image.new("L", (8, 6), 10), Image.new("L", (4, 3), 200)
    small.encoderinfo = {"tiffinfo": {254: 1}}  # a reduced copy
    assert (
        decode(encode(large, "TIFF", save_all=True, append_images=[small]), "a.tif") == 10
    ).all()


@pytest.mark.parametrize("value_range", [(200.0, 3000.0), (-5.0, 4095.0), (0.5, 10.0)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, ">u2"])
def test_a_range_maps_low_to_0_and_high_to_255(value_range, dtype):
    low, high = value_range
    stored = RNG.integers(0, 4096, (6, 8)).astype(dtype)
    expected = np.rint(255 * ((stored.astype(float) - low) / (high - low)).clip(0, 1))
    image = (
        Image.fromarray(stored)
        if dtype != ">u2"
        else Image.frombytes("I;16B", (8, 6), stored.tobytes())
    )
    np.testing.assert_array_equal(
        decode(encode(image, "TIFF"), "a.tif", PixelFormat(value_range=value_range))[..., 0],
        expected,
    )


def test_a_range_does_not_change_8_bit_images():
    content = encode(Image.fromarray(GRAY), "PNG")
    pixels = decode(content, "a.png", PixelFormat(value_range=(10.0, 20.0)))
    np.testing.assert_array_equal(pixels[..., 0], GRAY)


def test_16_bit_images_whose_zero_is_white_are_inverted():
    content = encode(Image.fromarray(np.array([[0, 65535]], np.uint16)), "TIFF")
    tag = struct.pack("<HHIHH", 262, 3, 1, 1, 0)  # photometric interpretation: black is zero
    assert content.count(tag) == 1
    inverted = content.replace(tag, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert decode(inverted, "a.tif")[..., 0].tolist() == [[255, 0]]


def test_the_headers_value_range_leaves_out_a_thousandth_at_each_end():
    stored = RNG.integers(200, 3000, (100, 100)).astype(np.uint16)
    stored[0, 0], stored[0, 1] = 65535, 0  # a hot and a dead pixel
    header = images.read_header(encode(Image.fromarray(stored), "TIFF"), "a.tif")
    assert header[:4] == ("I;16", 100, 100, 1)
    low, high = header.value_range
    assert 200 <= low < 210
    assert 2985 < high < 3000


def encode_16_bit_png(values: np.ndarray) -> bytes:
    """Encode 16-bit gray with alpha, RGB or RGBA as PNG, which Pillow does not write."""
    color_type = {2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(
        b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color_type, 0, 0, 0)
    )
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def error_of(content: bytes, name: str = "a", **options) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(content, name, **options)
    return str(caught.value)


class TestAmbiguousFilesAreRefused:
    def test_dark_16_bit_color(self):
        content = encode_16_bit_png(RNG.integers(0, 4096, (4, 6, 3)).astype(np.uint16))
        assert "a: its 16-bit color would keep 16 of 256 levels" in error_of(content)

    def test_dark_16_bits_with_a_saturated_pixel_with_alpha_and_in_a_ppm(self):
        dark = RNG.integers(0, 3900, (40, 30, 3)).astype(np.uint16)
        saturated, opaque = dark.copy(), np.full((40, 30), 65535, np.uint16)
        saturated[0, 0, 0] = 65535
        ppm = b"P6 30 40 65535\n" + dark.astype(">u2").tobytes()
        for content in (
            encode_16_bit_png(saturated),
            encode_16_bit_png(np.dstack([dark, opaque])),
            ppm,
        ):
            assert "a: its 16-bit color would keep 16 of 256 levels" in error_of(content)
        gray = encode_16_bit_png(np.dstack([dark[..., 0], opaque]))
        assert "a: its 16-bit color would keep 16 of 256 levels" in error_of(gray)

    def test_a_range_for_16_bit_color(self):
        content = encode_16_bit_png(RNG.integers(0, 65536, (4, 6, 3)).astype(np.uint16))
        assert "a: data.range is for gray images without alpha" in error_of(
            content, pixel_format=PixelFormat(value_range=(0.0, 4095.0))
        )

    def test_a_fourth_band_of_a_tiff(self):
        content = encode(Image.fromarray(np.dstack([COLOR, GRAY]), "RGBX"), "TIFF")
        assert error_of(content) == (
            "a has 4 channels, and data.channels is 3; set data.channels=4 if all images have that "
            "many"
        )

    def test_a_fourth_band_of_a_jpeg_2000(self):
        content = encode(Image.fromarray(np.dstack([COLOR, GRAY]), "RGBA"), "JPEG2000")
        assert "a: a JPEG 2000 of four bands does not say" in error_of(content)

    def test_a_jpeg_with_four_bands_and_no_adobe_marker(self):
        content = encode(Image.new("CMYK", (8, 8)), "JPEG")
        marker = content.index(b"\xff\xee")  # Adobe's APP14 marker
        length = int.from_bytes(content[marker + 2 : marker + 4])
        assert "a: its four bands are not marked as inks" in error_of(
            content[:marker] + content[marker + 2 + length :]
        )

    def test_pages_of_a_tiff(self):
        pages = [Image.new("L", (3, 2), value) for value in (10, 20)]
        content = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
        assert error_of(content) == (
            "a has 2 channels, and data.channels is 3; set data.channels=2 if all images have that "
            "many"
        )

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_alpha_that_is_0_everywhere(self, mode):
        assert "a: its alpha is 0 everywhere" in error_of(encode(Image.new(mode, (4, 4)), "PNG"))

    def test_a_tiff_that_pillow_cannot_read(self):
        content = encode(Image.fromarray(COLOR), "TIFF").replace(
            struct.pack("<HHIHH", 262, 3, 1, 2, 0), struct.pack("<HHIHH", 262, 3, 1, 9, 0)
        )
        assert error_of(content) == (
            "a: Pillow cannot read a TIFF with this compression or this number of bands or bits; "
            "convert it to gray or RGB with 8 or 16 bits"
        )


class TestUntrustedFiles:
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "WEBP"])
    def test_a_decompression_bomb_is_refused_before_it_is_decoded(self, format, monkeypatch):
        monkeypatch.setattr(images, "MAX_PIXELS", 1000)
        message = error_of(encode(Image.new("RGB", (40, 30)), format), "a.jpg")
        assert message.startswith("a.jpg: 40 x 30 pixels exceed the limit of 1,000")

    def test_a_jpeg_whose_header_claims_a_huge_size_is_refused(self):
        content = bytearray(encode(Image.new("L", (16, 16)), "JPEG"))
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = (60000).to_bytes(2) + (60000).to_bytes(2)
        assert error_of(bytes(content), "a.jpg").startswith(
            "a.jpg: 60,000 x 60,000 pixels exceed the limit of 178,956,970"
        )

    def test_decoding_starts_no_other_program(self):
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        assert error_of(eps, "a.jpg") == "a.jpg: not a known image format"
        assert "EPS" not in images.image_formats() and ".eps" not in images.image_suffixes()
        # Pillow's IPTC reader passes the content to any decoder.
        fields = {60: b"\1\0", 20: b"\0\12", 30: b"\0\12", 120: b"\0\5", 65: b"\1"}
        iptc = b"".join(
            bytes([28, 3, number, 0, len(value)]) + value for number, value in fields.items()
        )
        iptc += bytes([28, 8, 10, 0, len(eps)]) + eps
        with Image.open(io.BytesIO(iptc)) as image:
            assert image.format == "IPTC"
        assert error_of(iptc, "a.jpg") == "a.jpg: not a known image format"

    def test_a_file_with_a_jpeg_signature_reaches_no_other_decoder(self):
        png = encode(Image.fromarray(COLOR), "PNG")
        assert error_of(b"\xff\xd8" + png, "a.jpg").startswith("a.jpg: ")
        # ImageNet contains PNGs with the suffix of a JPEG.
        np.testing.assert_array_equal(decode(png, "a.jpg"), COLOR)


def build_damaged_files() -> dict[str, tuple[bytes, str]]:
    png, jpeg = encode(Image.fromarray(COLOR), "PNG"), encode(Image.fromarray(SMOOTH), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "empty": (b"", "a.png: the file is empty"),
        "text": (b"not an image", "a.png: not a known image format"),
        "a truncated JPEG": (jpeg[: len(jpeg) // 2], "a.png: "),
        "a truncated PNG": (png[: len(png) // 2], "a.png: "),
        "a flipped byte in a PNG": (bytes(flipped), "a.png: "),
        "floats": (
            encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
            "a.png: pixels of mode F have no agreed conversion to RGB",
        ),
        "32 bits": (
            encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"),
            "a.png: 32-bit integers have no agreed range",
        ),
    }


@pytest.mark.parametrize("case", build_damaged_files())
def test_the_error_names_an_unreadable_file_and_the_reason(case):
    content, message = build_damaged_files()[case]
    with pytest.raises(UnreadableImage) as caught:
        decode(content, "a.png")
    assert str(caught.value).startswith(message)


def test_the_header_of_an_8_bit_image_is_read_without_its_pixels():
    content = encode(Image.fromarray(COLOR), "PNG")
    assert images.read_header(content[:60], "a.png") == ("RGB", 7, 5, 1, None, 3, False)
