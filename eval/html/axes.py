"""Ranges, ticks and positions of the axes of a chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

MIN_RELATIVE_SPAN = 0.05  # smallest range of an axis relative to the largest value
MARGIN = 0.04  # free space above and below the values, relative to their range
MAX_TICKS = 5
SMALLEST_DECIMAL, LARGEST_DECIMAL = 1e-3, 1e6  # other numbers have an exponent
MAX_DIGITS = 8  # behind the point of a tick


@dataclass(frozen=True)
class Axis:
    """A horizontal or vertical axis from `low` to `high` that covers the pixels start to end."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def position(self, value: float) -> float:
        """Return the pixel of a value. Values outside of the range are moved to its ends."""
        low, high, value = map(self._transform, (self.low, self.high, value))
        fraction = (value - low) / (high - low)
        return self.start + (self.end - self.start) * min(1.0, max(0.0, fraction))

    def _transform(self, value: float) -> float:
        if not self.is_log:
            return value
        return math.log10(value) if value > 0 else -math.inf

    def ticks(self) -> list[float]:
        """Return round values inside of the range."""
        if self.is_log:
            exponents = range(
                math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1
            )
            stride = -(-len(exponents) // MAX_TICKS) or 1
            values = [10.0**exponent for exponent in exponents[::stride]]
            return values if len(values) > 1 else self._linear_ticks(nbins=3)
        return self._linear_ticks(MAX_TICKS)

    def _linear_ticks(self, nbins: int) -> list[float]:
        locator = MaxNLocator(nbins=nbins, steps=[1, 2, 2.5, 5, 10])
        tolerance = 1e-9 * (self.high - self.low)
        return [
            float(tick)
            for tick in locator.tick_values(self.low, self.high)
            if self.low - tolerance <= tick <= self.high + tolerance
        ]

    def labels(self) -> list[tuple[float, str]]:
        """Return the pixel and the text of each tick."""
        ticks = self.ticks()
        return [(self.position(tick), text) for tick, text in zip(ticks, format_ticks(ticks, self))]


def format_ticks(ticks: Sequence[float], axis: Axis) -> list[str]:
    """Format ticks with as many decimals as they need, all alike."""
    if axis.is_log and ticks[-1] >= 10 * ticks[0]:
        return [format_value(tick) for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    step = min(np.diff(ticks), default=1.0)
    is_exponential = 0 < largest < SMALLEST_DECIMAL or largest >= LARGEST_DECIMAL
    for digits in range(MAX_DIGITS):
        if is_exponential:
            texts = [_format_exponential(tick, digits) for tick in ticks]
        else:
            texts = [f"{tick:,.{digits}f}" for tick in ticks]
        values = [float(text.replace(",", "")) for text in texts]
        if np.allclose(values, ticks, rtol=0, atol=1e-3 * step):
            break
    return texts


def format_value(value: float, digits: int = 4) -> str:
    """Format a number with at most this many significant digits."""
    magnitude = abs(value)
    if magnitude and (magnitude < SMALLEST_DECIMAL or magnitude >= LARGEST_DECIMAL):
        return _format_exponential(value, digits - 1)
    if magnitude >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _format_exponential(value: float, digits: int) -> str:
    """Format a number such as 6.5e-8, with at most this many digits behind the point."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def fit(
    values: np.ndarray,
    pixels: tuple[float, float],
    *,
    scale: tuple[float, float] | None = None,
    is_log: bool = False,
    is_tight: bool = False,
) -> Axis:
    """Return an axis on which all values are visible.

    Small changes are not stretched over the whole axis: its range is at least `MIN_RELATIVE_SPAN`
    of the largest value.

    Args:
        values: Finite values, positive ones if the axis is logarithmic. At least one.
        pixels: First and last pixel of the axis.
        scale: Range that the axis covers in any case.
        is_log: True for a logarithmic axis.
        is_tight: True for an axis that ends at the outermost values.
    """
    low, high = float(values.min()), float(values.max())
    if scale:
        low, high = min(low, scale[0]), max(high, scale[1])
    if is_log:
        padding = 1.0 if is_tight and high > low else 1.15
        return Axis(low / padding, high * padding, *pixels, is_log=True)
    if not is_tight:
        smallest_span = MIN_RELATIVE_SPAN * max(abs(low), abs(high))
        missing = max(0.0, smallest_span - (high - low)) / 2
        low, high = low - missing, high + missing
        is_positive = low >= 0
        margin = MARGIN * (high - low)
        low, high = low - margin, high + margin
        low = max(low, 0.0) if is_positive else low
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return Axis(low, high, *pixels)
