"""Images of any number of channels: their values, what is refused, and what is not printed."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_pretrain.data import bands
from ssl_pretrain.data.images import UnreadableImage, decode, read_header
from ssl_pretrain.data.pixels import PixelFormat

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 256, (20, 21, 13), dtype=np.uint8)
WIDE = RNG.integers(0, 4096, (20, 21, 13), dtype=np.uint16)


def tiff(values: np.ndarray, **options) -> bytes:
    if "compression" in options:
        pytest.importorskip("imagecodecs", reason="the extra `tiff` is not installed")
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", **options)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def encode(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def error_of(content: bytes, num_channels: int = 3, **options) -> str:
    with pytest.raises(UnreadableImage) as error:
        decode(content, "a", PixelFormat(num_channels, **options))
    return str(error.value)


# Functions, because the compressed file needs the extra `tiff`.
FILES = {
    "interleaved bands": lambda: tiff(BANDS, planarconfig="contig"),
    "separate bands": lambda: tiff(BANDS.transpose(2, 0, 1), planarconfig="separate"),
    "pages": lambda: tiff(BANDS.transpose(2, 0, 1)),
    "compressed bands": lambda: tiff(BANDS, planarconfig="contig", compression="lzw"),
    "OME": lambda: tiff(BANDS.transpose(2, 0, 1), ome=True, metadata={"axes": "CYX"}),
    "ImageJ": lambda: tiff(BANDS.transpose(2, 0, 1), imagej=True, metadata={"axes": "CYX"}),
    "npy": lambda: npy(BANDS),
    "npy, channels first": lambda: npy(BANDS.transpose(2, 0, 1)),
    "npy, first axis fastest": lambda: npy(np.asfortranarray(BANDS)),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_has_the_values_of_its_bands(kind):
    content = FILES[kind]()
    pixels = decode(content, "a", PixelFormat(13))
    np.testing.assert_array_equal(pixels, BANDS)
    assert pixels.flags.writeable
    assert read_header(content, "a").num_channels == 13


def test_an_image_may_have_more_channels_than_rows():
    values = RNG.integers(0, 256, (5, 7, 13), dtype=np.uint8)
    np.testing.assert_array_equal(decode(npy(values), "a", PixelFormat(13)), values)
    assert read_header(npy(values), "a", 13).num_channels == 13


@pytest.mark.parametrize("encode_values", [tiff, npy])
def test_a_range_per_channel_scales_each_band(encode_values):
    lows, highs = np.arange(13) * 10.0, 4095 - np.arange(13) * 20.0
    options = {"planarconfig": "contig"} if encode_values is tiff else {}
    value_range = tuple(np.stack([lows, highs], axis=1).reshape(-1))
    pixels = decode(encode_values(WIDE, **options), "a", PixelFormat(13, value_range))
    expected = np.rint(255 * ((WIDE - lows) / (highs - lows)).clip(0, 1))
    np.testing.assert_array_equal(pixels, expected)


def test_a_range_per_channel_scales_gray_images_of_a_color_data_set():
    values = np.array([[0, 2000, 4000, 100, 200]], np.uint16)
    pixels = decode(encode(values, "PNG"), "a", PixelFormat(3, (0, 4000, 0, 2000, 0, 1000)))
    expected = [[0, 0, 0], [128, 255, 255], [255, 255, 255], [6, 13, 26], [13, 26, 51]]
    np.testing.assert_array_equal(pixels[0], expected)


def test_alpha_is_a_channel_where_there_are_that_many():
    rgba, gray_alpha = BANDS[..., :4], BANDS[..., :2]
    for format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(encode(rgba, format), "a", PixelFormat(4)), rgba)
    content = encode(gray_alpha, "PNG")
    np.testing.assert_array_equal(decode(content, "a", PixelFormat(2)), gray_alpha)
    header = read_header(content, "a")
    assert [header.can_become(count) for count in (1, 2, 3, 4)] == [True, True, True, False]


@pytest.mark.parametrize("compression", ["zstd", "webp", "jpeg2000"])
def test_color_of_a_compression_that_pillow_may_not_decode_is_read(compression):
    pytest.importorskip("imagecodecs", reason="the extra `tiff` is not installed")
    color = BANDS[..., :3]
    file = io.BytesIO()
    tifffile.imwrite(file, color, compression=compression, photometric="rgb")
    np.testing.assert_array_equal(decode(file.getvalue(), "a"), color)


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_gray_of_a_type_that_pillow_does_not_know_is_read(dtype):
    values = WIDE[..., 0].astype(dtype)
    pixels = decode(tiff(values), "a", PixelFormat(3, (0.0, 4000.0)))
    expected = np.rint(255 * (values / 4000).clip(0, 1))
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


class TestRefusals:
    def test_another_number_of_channels(self):
        color = encode(BANDS[..., :3], "PNG")
        assert error_of(color, 4) == (
            "a has 3 channels, and data.channels is 4; set data.channels=3 if all images have that "
            "many"
        )
        assert error_of(FILES["npy"](), 3) == (
            "a has 13 channels, and data.channels is 3; set data.channels=13 if all images have "
            "that many"
        )

    def test_16_bit_alpha_in_a_tiff(self):
        content = tiff(WIDE[..., :2], planarconfig="contig", extrasamples=["unassalpha"])
        assert error_of(content, 1) == (
            "a has 2 channels, and data.channels is 1; set data.channels=2 if all images have that "
            "many"
        )

    def test_modes_without_defined_channels(self):
        file = io.BytesIO()
        Image.new("CMYK", (4, 4)).save(file, "JPEG")
        assert error_of(file.getvalue(), 4) == (
            "a: its pixels are of mode CMYK, whose channels are not defined; save it as a TIFF or "
            "a .npy"
        )

    @pytest.mark.parametrize("num_channels", [3, 4])
    def test_no_other_program_is_started(self, num_channels):
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        assert error_of(eps, num_channels) == "a: not a known image format"

    def test_a_damaged_tiff(self):
        content = tiff(WIDE, planarconfig="contig")
        assert error_of(content[:-100], 13) == "a: failed to read 10920 bytes, got 10820"
        assert error_of(content[:150], 13).startswith("a: ")

    def test_a_tiff_that_declares_a_huge_size(self):
        content = tiff(WIDE, planarconfig="contig")
        for tag, length in ((256, 21), (257, 20)):  # width and height
            field = struct.pack("<HHII", tag, 4, 1, length)
            assert content.count(field) == 1
            content = content.replace(field, struct.pack("<HHII", tag, 4, 1, 100_000))
        assert error_of(content, 13) == (
            "a: its shape (100000, 100000, 13) has 130,000,000,000 values, more than the limit of "
            "536,870,912 (possibly a decompression bomb); cut it into smaller images"
        )

    def test_a_compressed_tiff_of_many_values(self, monkeypatch):
        monkeypatch.setattr(bands, "MAX_VALUES", 5000)
        assert error_of(FILES["compressed bands"](), 13).startswith(
            "a: its shape (20, 21, 13) has 5,460 values, more than the limit of 5,000 (possibly"
        )

    def test_pages_of_different_sizes_and_a_fourth_axis(self):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for height in (4, 5):
                writer.write(np.zeros((height, 4), np.uint8), photometric="minisblack")
        assert error_of(file.getvalue(), 2) == (
            "a: its pages have different sizes; save each as a file of its own"
        )
        stack = tiff(np.zeros((2, 3, 4, 5), np.uint16), imagej=True, metadata={"axes": "ZCYX"})
        assert error_of(stack, 3) == (
            "a: its axes are ZCYX with the lengths (2, 3, 4, 5); save one image per file, with "
            "bands or pages as channels"
        )

    @pytest.mark.parametrize("other_file", [True, False])
    def test_channels_that_are_in_other_files_or_nowhere(self, other_file):
        uuid = '<UUID FileName="other.ome.tif">urn:uuid:1</UUID>' if other_file else ""
        metadata = (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" '
            'SizeX="21" SizeY="20" SizeC="2" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0"/>'
            '<Channel ID="Channel:0:1"/><TiffData IFD="0" FirstC="0" PlaneCount="1"/>'
            f'<TiffData IFD="1" FirstC="1" PlaneCount="1">{uuid}</TiffData></Pixels></Image></OME>'
        )
        content = tiff(WIDE[..., 0], description=metadata, metadata=None)
        expected = (
            "a has 1 channel, and data.channels is 2; set data.channels=1 if all images have that "
            "many"
        )
        if not other_file:
            expected = (
                "a: its metadata promise an image of the shape (2, 20, 21), and pages are missing; "
                "save all channels in one file"
            )
        assert error_of(content, 2) == expected

    def test_an_npy_with_a_pickle(self):
        assert error_of(npy(np.array([[{}, 1]], object)), 3) == (
            "a: it holds Python objects, which only pickle can load, and a pickle can run any "
            "program; save an array of numbers"
        )

    @pytest.mark.parametrize(
        ("shape", "remedy"),
        [
            ((), ""),
            ((60,), ""),
            ((0, 4), ""),
            ((60, 8, 8, 3), "; an array of many images is given as data.root=FILE"),
        ],
    )
    def test_an_npy_with_another_shape(self, shape, remedy):
        content = npy(np.zeros(shape, np.uint8))
        assert error_of(content) == (
            f"a: its shape is {shape}; save one image as (height, width), (height, width, "
            f"channels) or (channels, height, width){remedy}"
        )
        with pytest.raises(UnreadableImage):
            read_header(content, "a")

    def test_an_npy_of_another_length_or_type(self):
        assert error_of(FILES["npy"]()[:-5], 13) == (
            "a: its header promises 5,460 bytes of values, and it has 5,455; copy it again"
        )
        assert error_of(npy(np.zeros((4, 4), complex))) == (
            "a: its values are of type complex128; save integers or floats"
        )
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, header)
        assert error_of(file.getvalue()).startswith(
            "a: its shape (1000000, 1000000) has 1,000,000,000,000 values, more than the limit"
        )

    def test_values_that_are_not_finite_or_need_a_range(self):
        values = WIDE.astype(np.float32)
        assert error_of(npy(values), 13).startswith("a: pixels of mode F have no agreed conversion")
        values[2, 3, 4] = np.nan
        assert error_of(npy(values), 13, value_range=(0.0, 4095.0)) == (
            "a: it has values that are not finite; replace them, or remove the image"
        )


PROGRAM = """
import logging
import sys
from pathlib import Path

sys.modules["imagecodecs"] = None  # as if it were not installed
from ssl_pretrain.data.images import decode, read_header
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.data.source_report import check_images
from ssl_pretrain.data.sources import DataConfig, open_source

folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.tif")):
    print(path.stem, decode(path.read_bytes(), path.name, PixelFormat(13)).shape)
    read_header(path.read_bytes(), path.name)
logging.getLogger("tifffile").warning("an unusual tag")
config = DataConfig(root=str(folder / "compressed"), channels=13, cache_dir=sys.argv[1])
try:
    check_images(open_source(config, "train"))
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def without_imagecodecs(tmp_path_factory):
    """Read usual TIFFs in a process without imagecodecs. Return its folder and its output."""
    folder = tmp_path_factory.mktemp("tiffs")
    gdal_tags = [(42112, "s", 0, "<GDALMetadata/>", True), (42113, "s", 0, "-9999", True)]
    for name, content in {
        "gdal": tiff(WIDE, planarconfig="contig", extratags=gdal_tags),
        "imagej": FILES["ImageJ"](),
        "ome": FILES["OME"](),
        "compressed/0": FILES["compressed bands"](),
    }.items():
        path = folder / f"{name}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    arguments = [sys.executable, "-c", PROGRAM, str(folder)]
    return folder, subprocess.run(arguments, capture_output=True, text=True, check=True)


def test_usual_files_of_other_programs_are_read_without_a_message(without_imagecodecs):
    _, result = without_imagecodecs
    shape = (20, 21, 13)
    assert result.stderr == ""
    assert result.stdout.startswith(f"gdal {shape}\nimagej {shape}\nome {shape}\n")


def test_a_missing_decoder_refuses_the_data_and_names_its_extra(without_imagecodecs):
    folder, result = without_imagecodecs
    assert result.stdout.splitlines()[3] == (
        f"{folder}/compressed/0.tif: its compression LZW needs imagecodecs, which is not "
        "installed; install it with `pip install '.[tiff]'` in a clone, or with `pip install "
        "'ssl_pretrain-0.1.0-py3-none-any.whl[tiff]'` where the wheel is"
    )
