"""Inline SVG for the report: line charts and scatter plots whose colours follow the page's theme."""

from __future__ import annotations

import math
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 38
MAX_POINTS = 600  # of a curve; longer ones are averaged over equal stretches
Points = list[tuple[float, float]]


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
    return [(float(x), float(y)) for x, y in (np.mean(part, axis=0) for part in np.array_split(np.array(points), MAX_POINTS))]


def line(points: Points, y_label: str, x_label: str = "epoch", marked: bool = False) -> str:
    """A curve with its axes; each point marked if `marked`, for the few measurements that are not a stream."""
    points = thin([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
    if not points:
        return '<p class="none">not recorded</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(0.0, *xs), max(xs)
    margin = 0.06 * (max(ys) - min(ys)) or 0.1 * abs(ys[0]) or 1.0
    y_low, y_high = min(ys) - margin, max(ys) + margin
    if min(ys) >= 0 > y_low:
        y_low = 0.0

    def across(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">']
    for y in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(x_low, x_high, 6):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    parts.append('<polyline class="curve" points="' + " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points) + '"/>')
    if marked or len(points) == 1:
        for x, y in points:
            parts.append(f'<circle class="dot" cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.6"><title>{x:g}: {y:.4g}</title></circle>')
    return "".join([*parts, "</svg>"])


def scatter(positions: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """Points (n, 2) in the colour of their class; without labels (-1) all alike."""
    low, high = positions.min(axis=0), positions.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    size = 440
    placed = 10 + (positions - low) / span * (size - 20)
    parts = [f'<svg class="scatter" viewBox="0 0 {size} {size}" role="img" aria-label="projection of {len(positions)} images">']
    for (x, y), label in zip(placed, labels):
        name = f"<title>{escape(classes[label])}</title>" if label >= 0 else ""
        parts.append(f'<circle cx="{x:.1f}" cy="{size - y:.1f}" r="3.2" fill="{colour(int(label), len(classes))}">{name}</circle>')
    return "".join([*parts, "</svg>"])


def colour(label: int, num_classes: int) -> str:
    """A class's colour, legible on white and on near black."""
    known = ("#4e79a7", "#f28e2b", "#e15759", "#4fa8a0", "#59a14f", "#c9a227", "#b07aa1", "#ff7f93", "#9c755f", "#8a8a8a")
    if label < 0:
        return "#8a8a8a"
    if num_classes <= len(known):
        return known[label]
    return f"hsl({label * 137.508 % 360:.0f} {55 + 20 * (label % 2)}% {48 + 10 * (label % 3 == 0)}%)"  # the golden angle
