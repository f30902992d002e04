"""List all images below a folder."""

from __future__ import annotations

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


def list_folder(root: str | Path, cache: Path) -> Listing:
    """List the images below a folder, at any depth. Links are followed.

    The listing is cached with the times of each folder's last change, and made again when one of
    them differs.

    Raises:
        ValueError: If a folder cannot be listed. The message names it.
    """
    return load_or_scan(os.path.abspath(root), cache, scan_folder)


def scan_folder(root: str) -> Scan:
    """Walk through a folder.

    Folders behind links come last, in the order of their names. A folder that was listed already,
    or that contains the root, is skipped. Its images would be in the list twice.
    """
    walk = _Walk(root)
    links: list[str] = []
    waiting = [("", False)]
    while waiting or links:
        path, is_behind_link = waiting.pop() if waiting else (heapq.heappop(links), True)
        folders, new_links = walk.read(path, is_behind_link)
        waiting += [(folder, is_behind_link) for folder in folders]
        for link in new_links:
            heapq.heappush(links, link)
    return walk.result()


class _Walk:
    """The files that a walk through a folder has met so far."""

    def __init__(self, root: str):
        self.root = root
        self._images: list[str] = []
        self._other_files: list[str] = []
        self._folders: list[str] = []
        self._stamps: list[int] = []
        self._skips = SkipCounter()
        self._visited = _ancestors(root)
        self._last_report = time.monotonic()

    def read(self, folder: str, is_behind_link: bool) -> tuple[list[str], list[str]]:
        """Add the files of one folder. Return the folders in it, and the links to folders."""
        path = os.path.join(self.root, folder)
        folders: list[str] = []
        links: list[str] = []
        try:
            status = os.stat(path)  # before the content, so that a change between makes it stale
            if not self._mark_visited(status) and is_behind_link:
                self._skips.add("links to folders that are listed already", folder)
                return [], []
            self._folders.append(folder)
            self._stamps += stamp(status)
            with os.scandir(path) as entries:
                for entry in entries:
                    below = os.path.join(folder, entry.name)
                    kind = entry_type(entry)
                    if kind == "folder":
                        (links if entry.is_symlink() else folders).append(below)
                    elif kind == "file":
                        (self._images if is_image(entry.name) else self._other_files).append(below)
                    else:
                        self._skips.add(kind, below)
        except OSError as error:
            raise ValueError(f"data.root: {path} cannot be listed: {error.strerror}") from None
        self._report()
        return folders, links

    def result(self) -> Scan:
        """Sort the images, and find the ones among files of other suffixes."""

        def head_of(path: str) -> bytes:
            return read_head(os.path.join(self.root, path))

        images = self._images + images_by_content(self._other_files, head_of, self._skips)
        listing = pack(self.root, sorted(images, key=os.fsencode))
        return Scan(replace(listing, skipped=self._skips.result()), self._folders, self._stamps)

    def _mark_visited(self, status: os.stat_result) -> bool:
        """Remember a folder. Return False if it was visited before."""
        identity = (status.st_dev, status.st_ino)
        is_new = not status.st_ino or identity not in self._visited
        self._visited.add(identity)
        return is_new

    def _report(self) -> None:
        if time.monotonic() - self._last_report > _REPORT_SECONDS:
            self._last_report = time.monotonic()
            num_images = f"{len(self._images):,} images so far"
            print(f"listing {self.root}: {num_images}", file=sys.stderr, flush=True)


def _ancestors(root: str) -> set[tuple[int, int]]:
    """Return the device and inode of each folder that contains the root."""
    identities = set()
    for ancestor in Path(os.path.realpath(root)).parents:
        with contextlib.suppress(OSError):
            status = ancestor.stat()
            identities.add((status.st_dev, status.st_ino))
    return identities
