"""Write the images of a source to one .beton file.

A write can be interrupted at any time. The same call continues it, and the file has the same bytes
as without the interruption. The file gets its final name when it is complete.
"""

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import __version__ as pillow_version
from PIL import features

from ssl_pretrain.data.beton import tables
from ssl_pretrain.data.beton.beton_manifest import Manifest, read_manifest, write_manifest
from ssl_pretrain.data.beton.encoder import (
    NEW_JPEG,
    PIXELS,
    UNCHANGED,
    UNREADABLE,
    EncodingSettings,
    encode_image,
    encode_images,
)
from ssl_pretrain.data.beton.journal import Journal, journal_path, open_journal, unfinished_path
from ssl_pretrain.data.beton.tables import read_tables
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.messages import report_progress

_FORMAT = 1  # increase it when the journal or the encoding changes


def write(
    source: Source,
    path: Path,
    settings: EncodingSettings,
    num_workers: int,
    start: int = 0,
    end: int | None = None,
) -> Manifest:
    """Write the images of a source from `start` up to `end`, or continue an interrupted write.

    Returns:
        The manifest of the finished file.

    Raises:
        ValueError: If another process writes the same file, an image is larger than a page, or no
            image is readable.
        RuntimeError: If a worker process is killed.
    """
    end = len(source) if end is None else end
    value_range = list(source.pixel_format.value_range or ()) or None
    shard_set_id = _hash(
        source.fingerprint,
        asdict(settings),
        pillow_version,
        features.version("libjpeg_turbo"),
        _FORMAT,
        *([value_range] if value_range else []),
    )
    write_id = _hash(shard_set_id, start, end)
    manifest = _finished_manifest(path, write_id)
    if manifest is not None:
        journal_path(path).unlink(missing_ok=True)  # the last step of an interrupted write
        return manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    page_offset = tables.first_page_offset(end - start, settings.page_size)
    with open_journal(path, write_id, page_offset, settings.page_size) as journal:
        num_done = len(journal.entries)
        images = encode_images(source, settings, num_workers, start + num_done, end)
        for entry, content in report_progress(images, end - start, "wrote", num_done):
            journal.append(entry, content)
        manifest = replace(
            _partial_manifest(source, settings, journal.to_array(), start),
            write_id=write_id,
            shard_set_id=shard_set_id,
            range=value_range,
            table_sha256=_write_tables(journal, path, settings.page_size),
        )
        # If the process is killed between the two renames, the manifest does not match the file.
        # Every reader detects that.
        write_manifest(path, manifest)
        os.replace(unfinished_path(path), path)
        journal_path(path).unlink()
    return manifest


def _finished_manifest(path: Path, write_id: str) -> Manifest | None:
    """Return the manifest if the same write has already finished, else None.

    Manifests of earlier versions have no hash of the tables. With these, a journal that still
    exists shows that the write was interrupted.
    """
    with suppress(ValueError):  # the manifest is damaged, or the file is not a .beton
        manifest = read_manifest(path)
        if manifest is not None and manifest.write_id == write_id and path.exists():
            is_finished = (
                manifest.table_sha256 == read_tables(path).sha256
                if manifest.table_sha256
                else not journal_path(path).exists()
            )
            return manifest if is_finished else None
    return None


def _write_tables(journal: Journal, path: Path, page_size: int) -> str:
    """Write the tables to the data file, and return their hash."""
    entries = journal.to_array()
    entries = entries[entries["outcome"] != UNREADABLE]
    if not len(entries):
        raise ValueError(
            "no image of the source can be read, so nothing was written; give another source"
        )
    samples = np.zeros(len(entries), tables.SAMPLE_DTYPE)
    samples["image"] = entries[list(tables.IMAGE_DTYPE.names or ())].astype(tables.IMAGE_DTYPE)
    samples["label"] = entries["label"]
    tables.write_tables(journal.data_file, samples, entries["length"], page_size)
    return read_tables(unfinished_path(path)).sha256


def _partial_manifest(
    source: Source, settings: EncodingSettings, entries: np.ndarray, start: int
) -> Manifest:
    """Return the manifest without its ids, its value range and the hash of the tables."""
    is_readable = entries["outcome"] != UNREADABLE
    readable_indices = np.flatnonzero(is_readable) + start
    unreadable_indices = np.flatnonzero(~is_readable) + start
    is_complete = len(readable_indices) == len(source)
    counts = np.bincount(entries["outcome"], minlength=UNREADABLE + 1).tolist()
    return Manifest(
        write_id="",
        shard_set_id="",
        num_samples=len(readable_indices),
        num_unchanged=counts[UNCHANGED],
        num_encoded=counts[NEW_JPEG],
        num_raw=counts[PIXELS],
        unreadable_images=[
            _explain_failure(source, index, settings) for index in unreadable_indices.tolist()
        ],
        classes=source.classes,
        fingerprint=(source if is_complete else source.take(readable_indices)).fingerprint,
        source_fingerprint=source.fingerprint,
        first_index=start,
        crc32=zlib.crc32(np.ascontiguousarray(entries["crc"][is_readable]).tobytes()),
        **asdict(settings),
    )


def _explain_failure(source: Source, index: int, settings: EncodingSettings) -> str:
    """Return the reason why an image could not be written."""
    try:
        encode_image(source, index, settings)
    except UnreadableImage as error:
        return str(error)
    return f"{source.name(index)}: was unreadable during the write, but is readable now"


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
