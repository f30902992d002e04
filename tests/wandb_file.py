"""Read the .wandb file that W&B's client writes, without the client or a server.

A header of 7 bytes precedes a LevelDB log. The log has blocks of 32 KiB with records, which are
split into fragments with a checksum. Each record is a `Record` of wandb.proto.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES, FILE_HEADER_BYTES, FRAGMENT_HEADER_BYTES = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """Yield the complete records of a file, in order."""
    content = path.read_bytes()
    assert content[:4] == b":W&B", f"{path} is not a W&B file"
    position, record = FILE_HEADER_BYTES, b""
    while position + FRAGMENT_HEADER_BYTES <= len(content):
        rest_of_block = BLOCK_BYTES - position % BLOCK_BYTES
        if rest_of_block < FRAGMENT_HEADER_BYTES:
            position += rest_of_block
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, position)
        fragment = content[
            position + FRAGMENT_HEADER_BYTES : position + FRAGMENT_HEADER_BYTES + length
        ]
        if len(fragment) < length or not FULL <= kind <= LAST:
            return
        position += FRAGMENT_HEADER_BYTES + length
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
                for key in outer:  # an image is nested: its path, its size and so on
                    parent = parent.setdefault(key, {})
                parent[last] = json.loads(item.value_json)
            rows.append(row)
    return rows
