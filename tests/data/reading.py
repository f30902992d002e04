"""Read all images of a source, and the text of an error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ssl_pretrain.data.image_source import Source


def read_all(source: Source) -> np.ndarray:
    """Return the images of a source, which have the same size."""
    return np.stack([source.read(index) for index in range(len(source))])


def texts_of(source: Source) -> list[list[list[str]]]:
    """Return the texts of all items."""
    return [source.texts(index) for index in range(len(source))]


def error_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the message of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    return str(error.value)
