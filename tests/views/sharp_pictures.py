"""Pictures on which resizing shows its every step."""

from __future__ import annotations

import numpy as np


def picture(height: int, width: int, kind: str) -> np.ndarray:
    """Return seeded noise, uint8 (height, width, 3), or the same in black and white, where the cubic overshoots most."""
    noise = np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return noise if kind == "noise" else np.where(noise > 127, 255, 0).astype(np.uint8)
