"""Colors of series and classes, with a contrast of 3 or more on the light and the dark page."""

import colorsys

from matplotlib.colors import to_hex, to_rgb

GRAY = "#858b91"
PALETTE = (
    "#3f7fc1",
    "#d9730d",
    "#4a9440",
    "#dd4447",
    "#a466b4",
    "#1c938a",
    "#a07f14",
    "#db5293",
    "#9c6b4f",
    "#7f858b",
)
LUMINANCE = 0.2  # relative luminance of the colors beyond the palette, as WCAG defines it


def color(index: int, num_colors: int) -> str:
    """Return the color of series or class `index`.

    Negative indices, the labels of unlabeled images, are gray.
    """
    if index < 0:
        return GRAY
    if num_colors <= len(PALETTE):
        return PALETTE[index]
    hue = index * 137.508 / 360 % 1  # steps of the golden angle give neighbors different hues
    saturation = 0.55 + 0.2 * (index % 2)
    dark, light = 0.0, 1.0
    for _ in range(12):
        lightness = (dark + light) / 2
        rgb = colorsys.hls_to_rgb(hue, lightness, saturation)
        dark, light = (lightness, light) if _luminance(rgb) < LUMINANCE else (dark, lightness)
    return to_hex(rgb)


def contrast(color_a: str, color_b: str) -> float:
    """Return the contrast of two colors as WCAG defines it, from 1 to 21."""
    low, high = sorted(_luminance(to_rgb(color)) for color in (color_a, color_b))
    return (high + 0.05) / (low + 0.05)


def _luminance(rgb: tuple[float, float, float]) -> float:
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
