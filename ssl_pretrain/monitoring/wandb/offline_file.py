"""What a W&B client wrote to its own .wandb file: the run's steps, read back without W&B's server.

The file is a LevelDB log (blocks of 32 KiB, records in pieces with a checksum) after a header of 7 bytes; each record is a
`Record` of wandb.proto.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path: Path) -> Iterator[bytes]:
    """The whole records of a file, in order; ends where it was cut off or is damaged."""
    content = path.read_bytes()
    if content[:4] != b":W&B":
        return
    position, record = HEADER, b""
    while position + HEADER <= len(content):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        piece = content[position + HEADER : position + HEADER + length]
        if (
            not FULL <= kind <= LAST
            or len(piece) < length
            or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum
        ):
            return
        position += HEADER + length
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            yield record


def records(path: Path) -> Iterator[Any]:
    """wandb.proto's `Record`s of a file."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made at import: no type checker sees what is in it

    for payload in payloads(path):
        record = messages.Record()
        record.ParseFromString(payload)
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as they were logged, `_step` among them."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            for item in record.history.item:
                *outer, last = list(item.nested_key) or [item.key]
                place = row
                for key in outer:  # of a picture: its path, its size, ...
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def last_step(folder: Path, run_id: str) -> int:
    """The last step that any client of this run wrote below `folder`; -1 for none."""
    files = folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb")
    return max((int(row["_step"]) for file in files for row in history(file)), default=-1)
