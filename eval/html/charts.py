"""Inline SVG for the report: line charts and scatter plots whose colours follow the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 38
MAX_POINTS = 600  # of a curve; longer ones are averaged over equal stretches
Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside [low, high], some `about` of them: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's label: 12,000 is 12k."""
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:.6g}"


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of a stretch."""
    if len(points) <= MAX_POINTS:
        return points
    return [
        (float(x), float(y))
        for x, y in (np.mean(part, axis=0) for part in np.array_split(np.array(points), MAX_POINTS))
    ]


def line(points: Points, y_label: str, x_label: str = "epoch", marked: bool = False) -> str:
    """A curve with its axes; each point marked if `marked`, for the few measurements that are not a stream."""
    return lines([("", points)], y_label, x_label, marked)


def lines(
    series: Sequence[tuple[str, Points]],
    y_label: str,
    x_label: str = "epoch",
    marked: bool = False,
    logarithmic: bool = False,
) -> str:
    """Curves in one frame, each in its colour with its name as a tooltip; `logarithmic` on both axes, of what is positive."""

    def shown(points: Points) -> Points:
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        return thin(
            [(math.log10(x), math.log10(y)) for x, y in finite if x > 0 and y > 0]
            if logarithmic
            else finite
        )

    drawn = [
        (name, number, points)
        for number, (name, each) in enumerate(series)
        if (points := shown(each))
    ]
    if not drawn:
        return '<p class="none">not recorded</p>'
    frame = _Frame([point for _, _, points in drawn for point in points], logarithmic)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">'
    ]
    parts += [
        *frame.axes(),
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>',
    ]
    for name, number, points in drawn:
        style = f' style="stroke:{colour(number, max(2, len(series)))}"' if len(series) > 1 else ""
        places = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline class="curve"{style} points="{places}"><title>{escape(name or y_label)}</title></polyline>'
        )
        if marked or len(points) == 1:
            fill = style.replace("stroke", "fill")
            for x, y in points:
                where = f'cx="{frame.across(x):.1f}" cy="{frame.down(y):.1f}"'
                parts.append(
                    f'<circle class="dot"{fill} {where} r="2.6"><title>{escape(name)} {x:g}: {y:.4g}</title></circle>'
                )
    return "".join([*parts, "</svg>"])


class _Frame:
    """The axes that hold all points, and where a value is between them."""

    def __init__(self, points: Points, logarithmic: bool):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.logarithmic = logarithmic
        self.x_low, self.x_high = min(xs) if logarithmic else min(0.0, *xs), max(xs)
        margin = 0.06 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
        self.y_low, self.y_high = min(ys) - margin, max(ys) + margin
        if min(ys) >= 0 > self.y_low and not logarithmic:
            self.y_low = 0.0

    def across(self, x: float) -> float:
        return LEFT + (x - self.x_low) / ((self.x_high - self.x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return (
            HEIGHT
            - BOTTOM
            - (y - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)
        )

    def axes(self) -> list[str]:
        parts = []
        for y in self._ticks(self.y_low, self.y_high, 5):
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.down(y):.1f}" y2="{self.down(y):.1f}"/>'
            )
            parts.append(
                f'<text x="{LEFT - 8}" y="{self.down(y) + 4:.1f}" text-anchor="end">{self._label(y)}</text>'
            )
        for x in self._ticks(self.x_low, self.x_high, 6):
            parts.append(
                f'<text x="{self.across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{self._label(x)}</text>'
            )
        return [
            *parts,
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        ]

    def _ticks(self, low: float, high: float, about: int) -> list[float]:
        if self.logarithmic and high - low >= 1:
            powers = range(math.ceil(low), math.floor(high) + 1)
            return [float(power) for power in powers][:: max(1, len(powers) // about)]
        if self.logarithmic:
            return [math.log10(value) for value in ticks(10**low, 10**high, about) if value > 0]
        return ticks(low, high, about)

    def _label(self, value: float) -> str:
        return f"{10**value:.3g}" if self.logarithmic else short(value)


def scatter(positions: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """Points (n, 2) in the colour of their class; without labels (-1) all alike."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    size = 440
    placed = 10 + (positions - low) / span * (size - 20)
    parts = [
        f'<svg class="scatter" viewBox="0 0 {size} {size}" role="img" aria-label="projection of {len(positions)} images">'
    ]
    for (x, y), label in zip(placed, labels):
        name = f"<title>{escape(classes[label])}</title>" if label >= 0 else ""
        parts.append(
            f'<circle cx="{x:.1f}" cy="{size - y:.1f}" r="3.2" fill="{colour(int(label), len(classes))}">{name}</circle>'
        )
    return "".join([*parts, "</svg>"])


def colour(label: int, num_classes: int) -> str:
    """A class's colour, legible on white and on near black."""
    known = (
        "#4e79a7",
        "#f28e2b",
        "#e15759",
        "#4fa8a0",
        "#59a14f",
        "#c9a227",
        "#b07aa1",
        "#ff7f93",
        "#9c755f",
        "#8a8a8a",
    )
    if label < 0:
        return "#8a8a8a"
    if num_classes <= len(known):
        return known[label]
    return f"hsl({label * 137.508 % 360:.0f} {55 + 20 * (label % 2)}% {48 + 10 * (label % 3 == 0)}%)"  # the golden angle
