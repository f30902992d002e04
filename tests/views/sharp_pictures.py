"""Pictures with sharp edges, which reveal every rounding of a resize."""

import numpy as np


def draw_picture(height: int, width: int, kind: str) -> np.ndarray:
    """Return seeded noise, uint8 (height, width, 3), of the kind "noise" or "black and white".

    The bicubic filter overshoots most in black and white.
    """
    noise = np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return noise if kind == "noise" else np.where(noise > 127, 255, 0).astype(np.uint8)
