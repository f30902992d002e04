"""What was drawn for a view, in words."""

from __future__ import annotations

from ssl_pretrain.views.color import BRIGHTNESS, CONTRAST, HUE, SATURATION, Parameters
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop

OPERATIONS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}


def text(crop: Crop, box: Box, parameters: Parameters, row: int) -> str:
    """The view of row `row`, in the order in which its operations are applied."""
    words = [f"{box.width}x{box.height} pixels at ({box.left}, {box.top})"]
    if box.flip:
        words.append("flipped")
    if parameters.jitter[row]:
        strengths = (crop.brightness, crop.contrast, crop.saturation, crop.hue)
        chosen = [
            int(operation) for operation in parameters.order[row] if strengths[int(operation)] > 0
        ]
        words += [
            _adjustment(crop, operation, parameters.factors[row, operation]) for operation in chosen
        ]
    if parameters.grayscale[row]:
        words.append("grey")
    if parameters.blur[row]:
        words.append(
            f"blur sigma {parameters.sigma[row]:.2f}"
            + (", black outside" if crop.blur_border == "zero" else "")
        )
    if parameters.solarize[row]:
        words.append("solarized")
    return ", ".join(words)


def _adjustment(crop: Crop, operation: int, factor: float) -> str:
    manner = {
        BRIGHTNESS: " added" if crop.brightness_mode == "add" else "",
        CONTRAST: " by channel" if crop.contrast_mean == "channel" else "",
        SATURATION: " in HSV" if crop.saturation_mode == "hsv" else "",
    }
    return f"{OPERATIONS[operation]} {factor:.2f}{manner.get(operation, '')}"
