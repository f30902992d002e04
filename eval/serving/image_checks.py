"""Check an uploaded image before it is decoded, and decode it as offline.

A few bytes can describe an image that fills the memory or keeps a processor busy for hours. The
checks read headers and tables of contents, and inflate the segments of deflate TIFFs up to a limit.
"""

import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import tifffile
from PIL import Image

from ssl_pretrain.data import bands, images
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.eval.serving.refusals import Refusal
from ssl_pretrain.system.optional_packages import is_installed

MAX_JPEG_SCANS = 100  # a camera's progressive JPEG has about 10; each scan costs a pass
MAX_TIFF_PAGES = 64  # twice the largest number of channels
PIXEL_BYTES = 4  # bytes that count as one pixel; a wider pixel counts as several
_ALLOWED = "JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF, PNM or .npy"
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
# Beginnings of the formats that are accepted. WebP and AVIF have theirs at a later position.
_SIGNATURES = {
    _JPEG: "JPEG",
    _PNG: "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    **dict.fromkeys((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), "PNM"),
    **dict.fromkeys(bands.TIFF_SIGNATURES, "TIFF"),
    bands.NPY_SIGNATURE: ".npy",
}
# Beginnings of what people send by mistake, for the message.
_OTHERS = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"<svg": "an SVG",
    b"<?xml": "XML",
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"{": "JSON",
    b"data:": "a data URL",
}
# Compressions of TIFFs that decode to a size that is known before: none, LZW, deflate, PackBits.
_BOUNDED_COMPRESSIONS = (1, 5, 8, 32773, 32946)
_DEFLATE = (8, 32946)
# JPEG markers that are followed by the length of their segment, and the end of the image. Bytes
# that decoders pass over in search of the next marker do not match.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


class DeclaredSize(NamedTuple):
    """Size of an image according to its header."""

    width: int
    height: int
    num_pages: int = 1
    pixel_bytes: int = PIXEL_BYTES  # bytes per decoded pixel of the largest page

    @property
    def num_pixels(self) -> int:
        """Number of pixels of all pages. One of more than 4 bytes counts as several."""
        widths = max(1.0, self.pixel_bytes / PIXEL_BYTES)
        return math.ceil(self.width * self.height * self.num_pages * widths)


class ImageDecoder:
    """Decodes uploaded images to pixels in the format of a network. Threads may share it.

    Images that exceed `max_pixels` together are decoded one after another, so that memory does not
    grow with the number of threads.

    Args:
        pixel_format: Format of the network's images.
        max_pixels: Largest number of pixels of an image, by `DeclaredSize.num_pixels`.
    """

    def __init__(self, pixel_format: PixelFormat, max_pixels: int):
        self._pixel_format, self._max_pixels = pixel_format, max_pixels
        self._free_pixels = max_pixels
        self._changed = threading.Condition()

    def decode(self, content: bytes, name: str) -> np.ndarray:
        """Return the pixels of an image, uint8 (height, width, channels), as offline.

        Args:
            content: Bytes of the image file.
            name: Name of the form field or of the body, for messages.

        Raises:
            Refusal: If the file is no image, is damaged, or exceeds a limit.
        """
        kind = recognize(content, name)
        size = read_size(content, kind, name)
        if size.num_pixels > self._max_pixels:
            raise _too_large(size, self._max_pixels, name)
        check_structure(content, kind, name)
        with self._reserve(size.num_pixels):
            try:
                return images.decode(content, name, self._pixel_format)
            except (images.UnreadableImage, images.UnreachableSource) as error:
                raise unreadable(name, str(error).removeprefix(f"{name}: ")) from None

    @contextmanager
    def _reserve(self, num_pixels: int) -> Iterator[None]:
        """Wait until there is memory for this many pixels, and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free_pixels >= num_pixels)
            self._free_pixels -= num_pixels
        try:
            yield
        finally:
            with self._changed:
                self._free_pixels += num_pixels
                self._changed.notify_all()


def recognize(content: bytes, name: str) -> str:
    """Return the format of an image file by its content.

    Raises:
        Refusal: If the content is not that of a format that is accepted.
    """
    if not content:
        raise Refusal(422, f"{name}: is empty.", "Send the bytes of an image file.")
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WebP"
    if content[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    start = content[:512].lstrip()
    kind = next((kind for sign, kind in _OTHERS.items() if start.startswith(sign)), "")
    looks = f" It looks like {kind}." if kind else ""
    raise Refusal(415, f"{name}: is not a known image format.{looks}", f"Send {_ALLOWED}.")


def unreadable(name: str, reason: str) -> Refusal:
    """Return the refusal of an image that cannot be decoded."""
    return Refusal(
        422,
        f"{name}: cannot be read as an image: {reason.rstrip('.')}.",
        "Open it in an image viewer, save it again, and send that copy.",
    )


def _too_large(size: DeclaredSize, max_pixels: int, name: str) -> Refusal:
    is_wide = size.pixel_bytes > PIXEL_BYTES
    of_bytes = f" of {size.pixel_bytes:,} bytes" if is_wide else ""
    of_limit = f" pixels of {PIXEL_BYTES} bytes" if is_wide else ""
    pages = f" in {size.num_pages} pages" if size.num_pages > 1 else ""
    return Refusal(
        413,
        f"{name}: {size.width:,} x {size.height:,} pixels{of_bytes}{pages} exceed the limit of "
        f"{max_pixels:,}{of_limit}.",
        "Send a smaller copy, or start the service with a larger --max-pixels.",
    )


def read_size(content: bytes, kind: str, name: str) -> DeclaredSize:
    """Return the size that a file declares.

    Raises:
        Refusal: If the header is damaged.
    """
    try:
        if kind == ".npy":
            return _npy_size(content)
        if kind == "WebP" and (canvas := _webp_size(content)):
            return DeclaredSize(*canvas)
        if kind == "JPEG" and any(size := images.jpeg_size(content)):
            return DeclaredSize(*size)
        if kind == "PNG" and any(size := images.png_size(content)):
            return DeclaredSize(*size)
        if kind == "TIFF":
            return _tiff_size(content)
        with Image.open(io.BytesIO(content), formats=images.image_formats()) as image:
            return DeclaredSize(image.width, image.height)
    except Image.DecompressionBombError:
        raise Refusal(
            413,
            f"{name}: its pixels exceed the limit of {images.MAX_PIXELS:,}.",
            "Send a smaller copy.",
        ) from None
    except Image.UnidentifiedImageError:
        raise unreadable(name, f"the header of the {kind} is damaged or cut off") from None
    except Exception as error:  # decoders raise almost anything for damaged files
        raise unreadable(name, str(error) or type(error).__name__) from None


def check_structure(content: bytes, kind: str, name: str) -> None:
    """Refuse files whose decoding would cost much more than the pixels that `max_pixels` counts."""
    if kind == "JPEG" and (num_scans := _count_scans(content)) > MAX_JPEG_SCANS:
        raise unreadable(
            name, f"the JPEG has {num_scans:,} scans, more than the limit of {MAX_JPEG_SCANS}"
        )
    if kind == "TIFF" and bands.has_bands(content):
        _check_tiff_segments(content, name)


def _count_scans(content: bytes) -> int:
    """Return the number of scans of a JPEG's first image.

    Phones append a film or further images, and headers hold a thumbnail. Neither is decoded.
    """
    num_scans, position = 0, 2
    while match := _JPEG_MARKER.search(content, position):
        start = match.start()
        marker = content[start + 1]
        if marker == _END_OF_IMAGE:
            break
        num_scans += marker == _START_OF_SCAN
        position = start + 2 + int.from_bytes(content[start + 2 : start + 4])
    return num_scans


def _npy_size(content: bytes) -> DeclaredSize:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    is_old = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    sides = sorted(shape)[-2:] if shape else [0]  # the shortest of three axes has the channels
    num_channels = math.prod(sorted(shape)[:-2])
    return DeclaredSize(sides[-1], sides[0], 1, num_channels * dtype.itemsize)


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Return the size of the canvas, which Pillow allocates when it opens a file."""
    kind, data = content[12:16], content[20:]
    if kind == b"VP8X" and len(data) >= 10:
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L" and len(data) >= 5:
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _tiff_size(content: bytes) -> DeclaredSize:
    """Return the size of the largest page, and the number of pages.

    Tiles that exceed the page count in full, because decoders allocate them.

    Raises:
        ValueError: If there are too many pages, or the file is cut off.
    """
    num_pages = _count_pages(content)
    if num_pages > MAX_TIFF_PAGES:
        raise ValueError(f"the TIFF has more than {MAX_TIFF_PAGES} pages")
    with tifffile.TiffFile(io.BytesIO(content), _multifile=False) as file:
        if not file.pages:
            raise ValueError("the TIFF has no page")
        sizes = [
            DeclaredSize(page.imagewidth, page.imagelength, num_pages, _count_pixel_bytes(page))
            for page in map(_as_page, file.pages)
        ]
    return max(sizes, key=lambda size: size.num_pixels)


def _count_pixel_bytes(page: tifffile.TiffPage) -> int:
    """Return the bytes per decoded pixel of a page, rounded up. Tiles count with their padding."""
    if not page.is_tiled:
        return page.samplesperpixel * page.imagedepth * _item_bytes(page)
    num_bytes = math.prod(page.chunked) * math.prod(page.chunks) * _item_bytes(page)
    return math.ceil(num_bytes / max(1, page.imagewidth * page.imagelength))


def _item_bytes(page: tifffile.TiffPage) -> int:
    return page.dtype.itemsize if page.dtype is not None else 1


def _as_page(page: tifffile.TiffPage | tifffile.TiffFrame) -> tifffile.TiffPage:
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def _count_pages(content: bytes) -> int:
    """Return the number of pages of a TIFF, or a number above the limit as soon as it is known."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = content[2:4] in (b"+\0", b"\0+")
    pointer, count, entry = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    (position,) = struct.unpack_from(f"{order}{pointer}", content, 8 if is_big else 4)
    num_pages = 0
    while position and num_pages <= MAX_TIFF_PAGES:
        (num_entries,) = struct.unpack_from(f"{order}{count}", content, position)
        end = position + struct.calcsize(f"{order}{count}") + num_entries * entry
        (position,) = struct.unpack_from(f"{order}{pointer}", content, end)
        num_pages += 1
    return num_pages


def _check_tiff_segments(content: bytes, name: str) -> None:
    """Refuse a TIFF for tifffile whose segments could decode to more than the image needs."""
    with tifffile.TiffFile(io.BytesIO(content), _multifile=False) as file:
        for page in map(_as_page, file.pages):
            num_offsets, num_segments = len(page.dataoffsets), math.prod(page.chunked)
            if num_offsets > num_segments:
                raise unreadable(
                    name,
                    f"a page of the TIFF has {num_offsets:,} segments, and its size needs "
                    f"{num_segments:,}",
                )
            compression = int(page.compression)
            if compression not in _BOUNDED_COMPRESSIONS:
                method = tifffile.COMPRESSION(compression).name
                raise unreadable(
                    name,
                    f"the service does not accept a TIFF with bands and the compression {method}; "
                    "save it without compression or with deflate",
                )
            if compression in _DEFLATE and not is_installed("imagecodecs"):
                _check_deflate(content, page, name)


def _check_deflate(content: bytes, page: tifffile.TiffPage, name: str) -> None:
    limit = math.prod(page.chunks) * _item_bytes(page)
    for offset, size in zip(page.dataoffsets, page.databytecounts):
        decompressor = zlib.decompressobj()
        decompressor.decompress(content[offset : offset + size], limit + 1)
        if decompressor.unconsumed_tail:
            raise unreadable(
                name, f"a segment of the TIFF inflates to more than its {limit:,} bytes"
            )
