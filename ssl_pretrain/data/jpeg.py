"""Decode JPEGs with libjpeg-turbo, and refuse those that it would only warn about.

simplejpeg contains libjpeg-turbo, decodes without the GIL, and can turn its warnings into errors.
Pillow and torchvision cannot, so they return gray areas for damaged data.
"""

import numpy as np
import simplejpeg


class DamagedJpeg(ValueError):
    """Error for bytes that are not a JPEG, or a JPEG that does not decode without a warning."""


def decode_intact(content: bytes, height: int, width: int) -> np.ndarray:
    """Return the RGB pixels of an undamaged JPEG, uint8 (height, width, 3).

    Args:
        content: Bytes of the JPEG.
        height: Height that the JPEG must have.
        width: Width that the JPEG must have.

    Raises:
        DamagedJpeg: If the bytes are not a JPEG of this size, or libjpeg-turbo warns about them.
            The message is the reason.
    """
    try:
        stored_height, stored_width, *_ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        raise DamagedJpeg("not a JPEG") from None
    if (stored_height, stored_width) != (height, width):
        raise DamagedJpeg("the JPEG's size differs from its table entry")
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(content)
    except ValueError:
        raise DamagedJpeg("the JPEG is damaged") from None
    return pixels


def is_intact(content: bytes, height: int, width: int) -> bool:
    """Return True if the bytes are a JPEG of this size that decodes without a warning."""
    try:
        decode_intact(content, height, width)
    except DamagedJpeg:
        return False
    return True
