"""Render self-contained HTML pages from the templates in `eval/html/templates`."""

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

MAX_PNG_PIXELS = 256 * 256  # larger pictures are embedded as JPEG
NO_BREAK = "\N{NO-BREAK SPACE}"
MAX_PICTURE_SIDE = 88  # largest side in pixels, for pictures in a strip of neighbors


@dataclass(frozen=True)
class Figure:
    """A chart or a picture with its caption."""

    image: Markup  # empty if nothing was recorded
    caption: str
    legend: tuple[tuple[str, str], ...] = ()  # name and color of each entry
    note: str = ""  # what the picture shows, below the caption
    reading: str = ""  # value that the page shows beside the caption
    file_name: str = ""  # name of the downloads without a suffix; empty for a picture without data


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = keep_units
    return environment


def render(template: str, **context: Any) -> str:
    """Render a template as text that UTF-8 can encode.

    Bytes of a file name that are not valid UTF-8 become escape sequences.
    """
    text = _templates().get_template(template).render(context)
    return text.encode(errors="backslashreplace").decode()


def keep_units(text: str) -> str:
    """Return text in which no line ends between a number and its percent sign or deviation."""
    return text.replace(" %", f"{NO_BREAK}%").replace(" ± ", f"{NO_BREAK}±{NO_BREAK}")


def image_data_url(image: Image.Image, quality: int = 88) -> str:
    """Return a data URL that embeds the picture, as PNG if it is small, else as JPEG."""
    file_type = "png" if image.width * image.height <= MAX_PNG_PIXELS else "jpeg"
    content = io.BytesIO()
    image.save(content, file_type, optimize=True, quality=quality)
    return f"data:image/{file_type};base64,{base64.b64encode(content.getvalue()).decode()}"


def pixels_data_url(pixels: np.ndarray) -> str:
    """Return a data URL that embeds uint8 pixels (3, height, width), shrunk to MAX_PICTURE_SIDE."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    return image_data_url(image)


def capitalize(text: str) -> str:
    """Return the text with a capital letter at its start, except for the name k-NN."""
    return text if text.startswith("k-NN") else text[:1].upper() + text[1:]
