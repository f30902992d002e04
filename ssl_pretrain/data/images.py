"""The bytes of one image file -> RGB pixels. One rule for every pixel format, so that a mixed folder needs no preparation.

| in the file | becomes |
|---|---|
| grey, 1-bit, palette | RGB, each grey value or palette entry as it is |
| alpha (RGBA, grey with alpha, a palette or colour marked transparent) | composited on black |
| CMYK, YCCK, YCbCr | RGB by Pillow's plain conversion; colour profiles are not applied |
| 16-bit grey | value / 257, rounded: 65,535 becomes 255 |
| 16-bit colour | the high byte, which is within one level of value / 257 |
| EXIF orientation | applied: the image is stored upright |
| several frames (GIF, TIFF) | the first |
| 32-bit integers above 65,535, floats, Lab | refused: they have no agreed range or conversion |
| 1x1 pixels | 1x1 pixels |
"""

import io

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_jpeg

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


class UnreadableImage(ValueError):
    """An image that cannot be had: absent, damaged, or of a format without an agreed RGB. The message names the file and the reason."""


def decode(content: bytes, name: str) -> np.ndarray:
    """RGB pixels by the rule above: uint8 (height, width, 3), writable, in any memory order.

    Raises:
        UnreadableImage: naming `name` and what is wrong with it. A truncated file is unreadable, never half grey.
    """
    if not content:
        raise UnreadableImage(f"{name}: the file is empty")
    if content.startswith(b"\xff\xd8") and (pixels := _plain_jpeg(content)) is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            pixels = _rgb(image)
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)  # after load, where Pillow has turned a TIFF already
    except Exception as error:  # decoders of damaged files raise nearly anything: SyntaxError, struct.error, zlib.error, ...
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
        raise UnreadableImage(f"{name}: {reason}") from error
    return np.ascontiguousarray(_UPRIGHT.get(orientation, lambda same: same)(pixels))


def header(content: bytes, name: str) -> tuple[str, int, int]:
    """(Pillow's mode, stored width, stored height) without decoding the pixels. Raises UnreadableImage."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.mode, image.width, image.height
    except Exception as error:
        raise UnreadableImage(f"{name}: no known image format") from error


def _plain_jpeg(content: bytes) -> np.ndarray | None:
    """What Pillow would give, bit for bit, in half the time for small images; None where Pillow has to decide."""
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), apply_exif_orientation=True)
    except RuntimeError:
        return None
    if len(pixels) == 4:  # CMYK, whose conversion differs
        return None
    return (pixels if len(pixels) == 3 else pixels.repeat(3, 1, 1)).permute(1, 2, 0).numpy()


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.array(image).astype(np.int64)  # Pillow reads 16-bit PGM as 32-bit
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers have no agreed range; convert the image to 8 or 16 bits")
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("F", "LAB"):
        raise ValueError(f"pixels of mode {image.mode} have no agreed conversion to RGB; convert the image to 8 or 16 bits")
    if image.has_transparency_data:
        pixels = np.array(image.convert("RGBA")).astype(np.uint16)
        return ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    return np.array(image.convert("RGB"))
