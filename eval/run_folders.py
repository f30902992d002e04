"""Find the runs below a folder, and read their states."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ssl_pretrain.eval.run_state import RunState, RunStateReader

MAX_DEPTH = 4  # folders between the given one and a run, such as a study and its variants
RUN_FILES = {"config.yaml", "metrics.jsonl", "lock.json"}  # any of them makes a folder a run


class RunFolders:
    """The runs below a folder, by name, where a name is the path below the folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._readers: dict[str, RunStateReader] = {}

    def read(self) -> dict[str, RunState]:
        """Return the state of every run, sorted by name.

        Runs that appeared are added and deleted ones are dropped. Of a known run, only what has
        changed is read.
        """
        paths = dict(sorted((self._name(path), path) for path in self._find()))
        self._readers = {
            name: self._readers.get(name) or RunStateReader(path) for name, path in paths.items()
        }
        return {name: _read(reader) for name, reader in self._readers.items()}

    def path(self, name: str) -> Path | None:
        """Return the folder of a run that the last `read` found, or None."""
        reader = self._readers.get(name)
        return reader.run if reader else None

    def _name(self, path: Path) -> str:
        if path == self.folder:  # the folder itself is a run
            return path.resolve().name
        return path.relative_to(self.folder).as_posix()

    def _find(self) -> Iterator[Path]:
        known = {str(reader.run) for reader in self._readers.values()}
        pending, seen = [(str(self.folder), 0)], set[tuple[int, int]]()
        while pending:
            folder, depth = pending.pop()
            with suppress(OSError):
                status = os.stat(folder)  # a link, such as latest, adds no second run
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            if folder in known and os.path.isdir(folder):
                yield Path(folder)
                continue
            with suppress(OSError), os.scandir(folder) as scan:
                entries = list(scan)
                if RUN_FILES & {entry.name for entry in entries}:
                    yield Path(folder)
                elif depth < MAX_DEPTH:
                    pending += [
                        (entry.path, depth + 1)
                        for entry in entries
                        if entry.is_dir() and not entry.name.startswith(".")
                    ]


def _read(reader: RunStateReader) -> RunState:
    """Return the state of a run. Files that are damaged in an unknown way hide no other run."""
    try:
        return reader.read()
    except Exception as error:
        return RunState("failed", f"its files cannot be read ({type(error).__name__}: {error})")
