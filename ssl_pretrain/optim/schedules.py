"""Progress of a run, in [0, 1], to a rate. Pure functions, so a resumed run needs only its step."""

from __future__ import annotations

import math


def warmup_cosine(
    progress: float, *, warmup: float, start: float = 0.0, peak: float = 1.0, final: float = 0.0
) -> float:
    """Linear from `start` to `peak` while progress < warmup, then half a cosine down to `final` (SGDR, arXiv:1608.03983, eq. 5)."""
    if progress < warmup:
        return start + (peak - start) * progress / warmup
    return cosine(
        (progress - warmup) / (1 - warmup) if warmup < 1 else 1.0, start=peak, final=final
    )


def cosine(progress: float, *, start: float, final: float) -> float:
    """Half a cosine from `start` at progress 0 to `final` at 1."""
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float, *, start: float, final: float, end: float = 1.0) -> float:
    """Straight from `start` at progress 0 to `final` at `end`, constant after it."""
    return start + (final - start) * min(1.0, progress / end) if end > 0 else final
