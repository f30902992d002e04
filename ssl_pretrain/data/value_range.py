"""Check the range of the values in images of 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ssl_pretrain.data.image_files import ImageFiles
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage, read_header

_MIN_SHARE = 0.25  # smallest share of the 16-bit values that may be in use: 14 bits
_NUM_MEASURED = 32  # images


def check_range(source: Source) -> None:
    """Raise ValueError if 16-bit images would become a few dark levels without `data.range`.

    Some images are read, evenly spaced in the source. Those of 8 bits and of floats are ignored.
    """
    if not isinstance(source, ImageFiles) or source.value_range is not None:
        return
    ranges = list(_measured_ranges(source))
    if not ranges:
        return
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if high - low >= _MIN_SHARE * 65536:
        return
    num_levels = max(1, round((high - low) / 257))
    raise ValueError(
        f"data.range: not set, and the 16-bit images of {source.where} use values from {low:,.0f} "
        f"to {high:,.0f} ({len(ranges)} of them measured), which would leave {num_levels} of 256 "
        "gray levels; give the values that are to be black and white, such as "
        f"data.range=[{low:.0f},{high:.0f}] (python -m ssl_pretrain.data.inspect measures them), "
        "or data.range=[0,65535] to leave them as they are"
    )


def _measured_ranges(source: ImageFiles) -> Iterator[tuple[float, float]]:
    """Yield the lowest and highest value of each 16-bit image in a sample."""
    sample = np.linspace(0, len(source) - 1, min(_NUM_MEASURED, len(source)))
    for index in sample.astype(np.int64).tolist():
        try:
            header = read_header(source.read_bytes(index), source.name(index))
        except UnreadableImage:
            continue
        if header.low is not None and header.high is not None and header.mode != "F":
            yield header.low, header.high
