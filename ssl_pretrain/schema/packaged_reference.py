"""Read the generated file that describes all keys and methods."""

import functools
import json
from importlib import resources
from typing import Any

FILE = "reference.json"


@functools.cache
def read() -> dict[str, Any]:
    """Return the descriptions of the keys and of the methods."""
    text = (resources.files("ssl_pretrain.schema") / FILE).read_text(encoding="utf-8")
    return dict(json.loads(text))
