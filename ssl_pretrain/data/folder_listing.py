"""List all images below a folder."""

import contextlib
import heapq
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from ssl_pretrain.data.file_types import (
    SkipCounter,
    entry_type,
    images_by_content,
    is_image,
    read_head,
)
from ssl_pretrain.data.listing import Listing, Scan, load_or_scan, pack, stamp

_REPORT_SECONDS = 5
_LINK = "link to a folder"


def list_folder(root: str | Path, cache: Path) -> Listing:
    """List the images below a folder, at any depth. Links are followed.

    The listing is cached with the time of each folder's last change, and renewed when one differs.

    Raises:
        ValueError: If a folder cannot be listed. The message names it.
    """
    return load_or_scan(os.path.abspath(root), cache, scan_folder)


def scan_folder(root: str) -> Scan:
    """Walk through a folder.

    Folders behind links come last, in the order of their names. A folder that was listed already,
    or that contains the root, is skipped. Its images would be in the list twice.
    """
    files: list[str] = []
    folders: list[str] = []
    stamps: list[int] = []
    skips = SkipCounter()
    visited = _ancestors(root)
    waiting = [("", False)]
    links: list[str] = []
    last_report = time.monotonic()
    while waiting or links:
        folder, is_behind_link = waiting.pop() if waiting else (heapq.heappop(links), True)
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)  # before the content, so that a change between makes it stale
            identity = (status.st_dev, status.st_ino)
            if is_behind_link and status.st_ino and identity in visited:
                skips.add("links to folders that are listed already", folder)
                continue
            entries = _read_entries(path)
        except OSError as error:
            raise ValueError(f"data.root: {path} cannot be listed: {error.strerror}") from None
        visited.add(identity)
        folders.append(folder)
        stamps += stamp(status)
        for kind, name in entries:
            relative = os.path.join(folder, name)
            if kind == _LINK:
                heapq.heappush(links, relative)
            elif kind == "folder":
                waiting.append((relative, is_behind_link))
            elif kind == "file":
                files.append(relative)
            else:
                skips.add(kind, relative)
        if time.monotonic() - last_report > _REPORT_SECONDS:
            last_report = time.monotonic()
            print(f"listing {root}: {len(files):,} files so far", file=sys.stderr, flush=True)
    images = [path for path in files if is_image(path)]
    others = [path for path in files if not is_image(path)]
    images += images_by_content(others, lambda path: read_head(os.path.join(root, path)), skips)
    listing = pack(root, sorted(images, key=os.fsencode))
    return Scan(replace(listing, skipped=skips.result()), folders, stamps)


def _read_entries(path: str) -> list[tuple[str, str]]:
    """Return the type and the name of each entry of a folder."""
    with os.scandir(path) as scan:
        entries = [(entry_type(entry), entry) for entry in scan]
        return [
            (_LINK if kind == "folder" and entry.is_symlink() else kind, entry.name)
            for kind, entry in entries
        ]


def _ancestors(root: str) -> set[tuple[int, int]]:
    """Return the device and inode of each folder that contains the root."""
    identities = set()
    for ancestor in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            status = ancestor.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities
