"""Read the names of the classes from a file beside the shards."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_pretrain.data.images import UnreachableSource
from ssl_pretrain.data.tar import remote_store
from ssl_pretrain.data.tar.remote_errors import StoreOutage, printable_url
from ssl_pretrain.data.tar.remote_store import is_remote
from ssl_pretrain.data.tar.shard_patterns import join

CLASS_FILES = ("classes.json", "classes.txt")


def read_classes(folders: Sequence[str]) -> list[str]:
    """Return the names in `classes.json` or `classes.txt`, or nothing if there is no such file."""
    for folder in folders:
        for file_name in CLASS_FILES:
            path = join(folder, file_name)
            content = _read_file(path)
            if content is None:
                continue
            text = content.decode("utf-8-sig", "replace")
            if file_name.endswith(".txt"):
                return [line.strip() for line in text.splitlines() if line.strip()]
            return _parse_classes(text, printable_url(path))
    return []


def _parse_classes(text: str, path: str) -> list[str]:
    """Return the names in a JSON list, or in an object from numbers to names or the reverse."""
    try:
        value: Any = json.loads(text)
        if isinstance(value, dict):
            pairs = {int(key): name for key, name in value.items()} if _has_numbers(value) else {}
            pairs = pairs or {number: name for name, number in value.items()}
            value = [pairs[number] for number in range(len(pairs))]
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"data.root: {path} is not a list of class names; write a JSON list, such as "
        '["cat", "dog"], or delete the file'
    )


def _has_numbers(value: dict[str, Any]) -> bool:
    return all(key.isdecimal() for key in value)


def _read_file(path: str) -> bytes | None:
    if not is_remote(path):
        return Path(path).read_bytes() if os.path.isfile(path) else None
    try:
        return remote_store.read_object(path)
    except UnreachableSource as error:
        if isinstance(error, StoreOutage):
            raise
        return None
