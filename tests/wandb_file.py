"""Reads the .wandb file that W&B's client writes, without the client or a server.

The file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB that hold records, split into
fragments with a checksum. Each record is a `Record` of wandb.proto.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """Yield the complete records of a file, in order."""
    content = path.read_bytes()
    assert content[:4] == b":W&B", f"{path} is not a W&B file"
    position, record = HEADER, b""
    while position + HEADER <= len(content):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, position)
        fragment = content[position + HEADER : position + HEADER + length]
        if len(fragment) < length or not FULL <= kind <= LAST:
            return
        position += HEADER + length
        record = fragment if kind in (FULL, FIRST) else record + fragment
        if kind in (FULL, LAST):
            yield record


def records(path: Path) -> Iterator[Any]:
    """Yield the `Record`s of a file."""
    from wandb.proto import wandb_internal_pb2

    for payload in payloads(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """Return the rows that were logged, with their `_step`."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            for item in record.history.item:
                *outer, last = list(item.nested_key) or [item.key]
                parent = row
                for key in outer:  # a picture has its path, its size, ...
                    parent = parent.setdefault(key, {})
                parent[last] = json.loads(item.value_json)
            rows.append(row)
    return rows
