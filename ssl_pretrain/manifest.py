"""A checkpoint's folder: written beside and renamed, its manifest, whether it is whole, and which of a run's to take or drop.

The manifest holds the size and SHA-256 of every file, so a damaged checkpoint is known by name and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WRITING = ".writing-"


def folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by their step numbers, whole or not."""
    return sorted((path for path in folder(Path(run)).glob("step_*") if path.is_dir() and path.name[5:].isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def probe(run: Path) -> str | None:
    """Removes what an interrupted save left, and writes a little; why that failed, if it did."""
    place = folder(run)
    probe = place / f"{WRITING}probe-{uuid.uuid4().hex[:8]}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob(f"{WRITING}*"):
            shutil.rmtree(path, ignore_errors=True)
        probe.mkdir()
        (probe / "probe").write_bytes(bytes(4096))
        _fsync(probe / "probe")
        shutil.rmtree(probe)
    except OSError as error:
        return (
            f"output: no checkpoint can be written to {place}: {error.strerror or error}; "
            "make room or give the right to write there, or give another output"
        )
    return None


def is_there(final: Path) -> bool:
    """Whether that checkpoint is: resumed from it, or saved by the same step. A damaged one, reached again from the one before, goes."""
    if not final.exists():
        return False
    with suppress(ValueError):
        verify(final)
        return True
    shutil.rmtree(final)
    return False


def newest(run: str | Path) -> Path:
    """The newest whole checkpoint; a damaged one is named in a warning and passed over.

    Raises:
        ValueError: the run has none, or none that is whole.
    """
    found = checkpoints(run)
    if not found:
        raise ValueError(
            f"{run}: no checkpoint there (looked for {folder(Path(run)) / 'step_*'}); give the folder of a run that has saved one"
        )
    problems = []
    for path in reversed(found):
        try:
            verify(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name} instead", stacklevel=2)
        return path
    raise ValueError(
        f"{run}: none of its {len(found)} checkpoints is whole: {'; '.join(problems)}. Nothing was loaded; restore one or give a new output"
    )


def load(path: Path) -> dict[str, Any]:
    """As it is written, its files not looked at. Raises ValueError where it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path.name}/{MANIFEST} cannot be read ({type(error).__name__})") from None
    return manifest


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint, once every file has the size and SHA-256 it says.

    Raises:
        ValueError: names the file that is missing, truncated or changed.
    """
    manifest = load(path)
    files = manifest["files"]
    for name, expected in files.items():
        file = path / name
        size = file.stat().st_size if file.exists() else -1
        if size < 0:
            raise ValueError(f"{path.name}/{name} is missing")
        if size != expected["bytes"]:
            raise ValueError(f"{path.name}/{name} is truncated: {size} bytes of {expected['bytes']}")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(f"{path.name}/{name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """What the manifest says of these files."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def finish(final: Path, writing: Path, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """The last of a save: the manifest, everything on the disk for good, and the name that makes it count."""
    (writing / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1))
    for path in [*writing.iterdir(), writing]:
        _fsync(path)
    os.rename(writing, final)
    _fsync(final.parent)


def prune(written: Path, keep_last: int, keeps: Callable[[int], bool]) -> None:
    """Removes all but the last `keep_last`, at least one, up to the one just written, which is whole, whatever lies there under a
    higher number; and but those whose step `keeps` says."""
    found = [path for path in checkpoints(written.parent.parent) if _step(path) <= _step(written)]
    for path in found[: -max(1, keep_last)]:
        if not keeps(_step(path)):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
