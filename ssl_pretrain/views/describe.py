"""Describe the random choices of a view in words."""

from ssl_pretrain.views.color_parameters import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    ColorParameters,
    strengths,
)
from ssl_pretrain.views.crops import Box
from ssl_pretrain.views.recipe import Crop

OPERATIONS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}


def describe_view(crop: Crop, box: Box, parameters: ColorParameters, row: int) -> str:
    """Describe the view in a row, in the order in which its operations are applied."""
    words = [f"{box.width}x{box.height} pixels at ({box.left}, {box.top})"]
    if box.flip:
        words.append("flipped")
    if parameters.jitter[row]:
        strength = strengths(crop)
        words += [
            _describe_operation(crop, operation, parameters.factors[row, operation])
            for operation in parameters.order[row].tolist()
            if strength[operation] > 0
        ]
    if parameters.grayscale[row]:
        words.append("gray")
    if parameters.blur[row]:
        border = ", black outside" if crop.blur_border == "zero" else ""
        words.append(f"blur sigma {parameters.sigma[row]:.2f}{border}")
    if parameters.solarize[row]:
        words.append("solarized")
    return ", ".join(words)


def _describe_operation(crop: Crop, operation: int, factor: float) -> str:
    modes = {
        BRIGHTNESS: " added" if crop.brightness_mode == "add" else "",
        CONTRAST: " by channel" if crop.contrast_mean == "channel" else "",
        SATURATION: " in HSV" if crop.saturation_mode == "hsv" else "",
    }
    return f"{OPERATIONS[operation]} {factor:.2f}{modes.get(operation, '')}"
