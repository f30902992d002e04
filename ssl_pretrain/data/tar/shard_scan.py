"""Make the index of a shard by reading its headers, labels and captions, but no image.

A sample consists of the members that follow each other and whose paths are equal up to the first
dot of the file name, as in WebDataset: `cat/0001.jpg`, `cat/0001.cls` and `cat/0001.json` are one.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from ssl_pretrain.data.file_types import HIDDEN, SkipCounter, is_array, is_image, is_skipped
from ssl_pretrain.data.tar.sample_texts import (
    has_captions,
    label_text,
    parse_json,
    parse_label,
    read_text,
)
from ssl_pretrain.data.tar.shard_index import Shard, ShardIndex
from ssl_pretrain.data.tar.tar_members import Member, ReadAt, WindowReader, iterate_members

LOCAL_WINDOW_BYTES = 4096  # a header, small members and the next header
REMOTE_WINDOW_BYTES = 8 << 20  # a request costs as much time as some megabytes


@dataclass
class _Columns:
    """Columns of the index, one item per sample."""

    keys: list[bytes] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    captions: list[tuple[int, int]] = field(default_factory=list)


def scan_shard(
    shard: Shard,
    name: str,
    read_at: ReadAt,
    window_bytes: int = LOCAL_WINDOW_BYTES,
    writer: dict[str, Any] | None = None,
) -> ShardIndex:
    """Return the index of a shard.

    Args:
        shard: The shard.
        name: Name of the shard for messages.
        read_at: Function that reads from the shard.
        window_bytes: Smallest number of bytes per read.
        writer: Facts to store in the index.

    Raises:
        ValueError: If the shard cannot be used. The message names it, the offset and the remedy.
    """
    reader = WindowReader(read_at, shard.size, window_bytes)
    columns, skip_counter = _Columns(), SkipCounter()
    first_offsets: dict[str, int] = {}
    members = _sample_members(reader, name, skip_counter)
    for key, group in groupby(members, key=lambda item: item[0]):
        sample = [(suffix, member) for _, suffix, member in group]
        offset = sample[0][1].header_offset
        if key in first_offsets:
            raise ValueError(
                f"data.root: {name} has two samples with the key {key!r}, at the offsets "
                f"{first_offsets[key]:,} and {offset:,}; give each sample its own key, and keep "
                "the members of a sample together"
            )
        first_offsets[key] = offset
        _add_sample(columns, key, sample, reader, name, skip_counter)
    label_names = tuple(sorted(set(columns.labels) - {""}))
    label_indices = {label: index for index, label in enumerate(label_names)} | {"": -1}
    captions = columns.captions if any(length for _, length in columns.captions) else []
    return ShardIndex(
        shard.size,
        shard.version,
        packed_keys=np.frombuffer(b"".join(columns.keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in columns.keys], dtype=np.int64),
        label=np.array([label_indices[label] for label in columns.labels], np.int32),
        **_split("offset", "length", columns.positions),
        **_split("caption_offset", "caption_length", captions),
        label_names=label_names,
        skipped=skip_counter.skipped_files(),
        writer=writer or {},
    )


def _split(first: str, second: str, pairs: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    table = np.array(pairs, np.int64).reshape(-1, 2)
    return {first: table[:, 0].copy(), second: table[:, 1].copy()}


def _sample_members(
    reader: WindowReader, name: str, skip_counter: SkipCounter
) -> Iterator[tuple[str, str, Member]]:
    """Yield the key and the suffix of each member that belongs to a sample, and the member."""
    for member in iterate_members(reader, name):
        levels = [level for level in member.name.split("/") if level not in ("", ".")]
        if not levels or member.name.endswith("/"):
            continue
        path = "/".join(levels)
        stem, _, suffix = levels[-1].partition(".")
        if any(is_skipped(level) for level in levels if level != ".."):
            skip_counter.add(HIDDEN, path)
        elif member.is_regular and suffix:
            yield "/".join([*levels[:-1], stem]), suffix.lower(), member
        elif member.is_regular:
            skip_counter.add("files without a suffix", path)


def _add_sample(
    columns: _Columns,
    key: str,
    sample: list[tuple[str, Member]],
    reader: WindowReader,
    name: str,
    skip_counter: SkipCounter,
) -> None:
    """Add a sample to the columns, or count it if it has no image."""
    image = _find_image(key, sample, name)
    if image is None:
        skip_counter.add("samples without an image", key)
        return
    label, caption = "", (0, 0)
    has_cls = any(suffix == "cls" for suffix, _ in sample)
    for suffix, member in sample:
        if suffix == "txt":
            caption = (member.offset, member.length)
        elif suffix == "cls":
            label = parse_label(read_text(reader, member, name), member, name)
        elif suffix == "json":
            values = parse_json(read_text(reader, member, name), member, name)
            if not has_cls:
                value = values.get("label", values.get("cls"))
                label = parse_label(label_text(value), member, name)
            if not caption[1] and has_captions(values):
                caption = (member.offset, member.length)
        elif member is not image:
            skip_counter.add(f".{suffix} members", member.name)
    columns.keys.append(key.encode("utf-8", "surrogateescape"))
    columns.positions.append((image.offset, image.length))
    columns.labels.append(label)
    columns.captions.append(caption)


def _find_image(key: str, sample: list[tuple[str, Member]], name: str) -> Member | None:
    """Return the member with the image.

    `0001.jpg` is preferred to `0001.mask.png`, and both to `0001.npy`, which may hold features.
    """
    images = [(suffix, member) for suffix, member in sample if is_image(f"image.{suffix}")]
    plain = [member for suffix, member in images if "." not in suffix]
    candidates = plain or [member for _, member in images]
    pictures = [member for member in candidates if not is_array(member.name)]
    candidates = pictures or candidates
    if len(candidates) > 1:
        names = " and ".join(os.path.basename(member.name) for member in candidates[:2])
        raise ValueError(
            f"data.root: {name}: the sample {key!r} at offset {sample[0][1].header_offset:,} has "
            f"several images, {names}; keep one image per sample, or name the others with two "
            f"suffixes, such as {os.path.basename(key)}.mask.png"
        )
    return candidates[0] if candidates else None
