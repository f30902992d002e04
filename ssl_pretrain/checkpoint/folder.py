"""Folders of checkpoints and their manifests: write, verify, find the newest, prune.

A checkpoint is written under another name beside its final one and renamed when it is complete. The
manifest lists the size and SHA-256 of every file and ends in a SHA-256 of its own text. A damaged
checkpoint is therefore detected, named and skipped in favor of the one before it. Format 1 had no
hash of the manifest itself. Such manifests are still read, with every other check.
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

from ssl_pretrain.system import durable_files

FORMAT = 2
READABLE = (1, FORMAT)
MANIFEST = "manifest.json"
HASH = "manifest_sha256"  # last entry of the manifest: SHA-256 of the text before it
WRITING = ".writing-"
WHOLE_FILES = ("method.safetensors", "optimizer.safetensors")
SHARD = "shard-"
KIND_NAMES = {int: "number", dict: "object", str: "text"}


def folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def checkpoints(run: str | Path) -> list[Path]:
    """Return the run's checkpoint folders in the order of their steps, damaged ones included."""
    return sorted(
        (
            path
            for path in folder(Path(run)).glob("step_*")
            if path.is_dir() and path.name[5:].isdecimal()
        ),
        key=_step,
    )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def probe(run: Path) -> OSError | None:
    """Remove the remains of interrupted saves and try every call that a save needs.

    Returns:
        The failure, with a message for the user in `strerror`, or None.
    """
    place = folder(run)
    beside = place / f"{WRITING}probe-{uuid.uuid4().hex[:8]}"
    renamed = beside.with_name(f"{beside.name}-renamed")
    doing = "make a folder"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob(f"{WRITING}*"):
            shutil.rmtree(path, ignore_errors=True)
        beside.mkdir()
        doing = "write a file"
        (beside / "probe").write_bytes(bytes(4096))
        doing = "fsync a file"
        durable_files.sync(beside / "probe")
        doing = "fsync a folder"
        durable_files.sync_folder(beside)
        doing = "rename a folder"
        os.rename(beside, renamed)
        durable_files.sync_folder(place)
        doing = "remove a folder"
        shutil.rmtree(renamed)
    except OSError as error:
        for path in (beside, renamed):
            shutil.rmtree(path, ignore_errors=True)
        text = (
            f"output: no checkpoint can be written to {place}: {durable_files.reason(error)} ({doing}); "
            "make room or give the right to write there, or give another output"
        )
        return OSError(error.errno, text)
    return None


def is_there(final: Path) -> bool:
    """Return True if an intact checkpoint exists. Remove anything else that has its name.

    Of a symbolic link only the link is removed, never its target.
    """
    if not os.path.lexists(final):
        return False
    if not final.is_dir():
        final.unlink()
        return False
    with suppress(ValueError):
        verify(final)
        return True
    if final.is_symlink():
        final.unlink()
    else:
        shutil.rmtree(final)
    return False


def newest(run: str | Path) -> Path:
    """Return the newest intact checkpoint. Damaged ones are skipped with a warning.

    Raises:
        ValueError: The run has no checkpoint, or all of them are damaged.
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
    """Read and check the manifest of a checkpoint folder, without reading the files it lists.

    Raises:
        ValueError: It cannot be read, was changed, or belongs to another folder.
    """
    name = f"{path.name}/{MANIFEST}"
    try:
        text = (path / MANIFEST).read_bytes().decode()
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{name} cannot be read: it is no JSON object")
    if not _has_its_hash(text) and not _is_of_another_format(manifest, text):
        raise ValueError(f"{name} is damaged: its SHA-256 is not the one at its end")
    problem = _shape_problem(manifest) or _folder_problem(path, manifest)
    if problem:
        raise ValueError(f"{name} cannot be read: {problem}")
    return manifest


def dumps(manifest: dict[str, Any]) -> str:
    """Format a manifest as JSON that ends in the SHA-256 of the text before it."""
    body = json.dumps(
        {key: value for key, value in manifest.items() if key != HASH}, indent=1
    ).removesuffix("\n}")
    return f'{body},\n "{HASH}": "{_digest(body)}"\n}}'


def _has_its_hash(text: str) -> bool:
    body, comma, end = text.rpartition(",\n")
    return comma != "" and end == f' "{HASH}": "{_digest(body)}"\n}}'


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _is_of_another_format(manifest: dict[str, Any], text: str) -> bool:
    """Return True for format 1, which had no hash, and for an unknown format without our hash line.

    One flipped bit cannot turn a manifest of this format into either: 1 and 2 differ in two bits,
    and the hash line stays.
    """
    if manifest.get("format") == 1:
        return HASH not in manifest
    return manifest.get("format") not in READABLE and f',\n "{HASH}": "' not in text


def _shape_problem(manifest: dict[str, Any]) -> str | None:
    """Describe the first entry that is missing or has the wrong type, or return None."""
    kinds = {
        "step": int,
        "files": dict,
        "config": dict,
        "machine": dict,
        "versions": dict,
        "evaluated": str,
        "network": str,
    }
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind) or isinstance(manifest[key], bool):
            return f"{key} is missing or is no {KIND_NAMES[kind]}"
    files = manifest["files"]
    for name, entry in files.items():
        if not name or Path(name).name != name or name == MANIFEST:
            return f"files: {name!r} is not the name of a file in that folder"
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("sha256"), str)
        ):
            return f"files: {name!r} has no bytes or no sha256"
    if not set(WHOLE_FILES) <= files.keys() and not any(name.startswith(SHARD) for name in files):
        return f"files: lists neither {' and '.join(WHOLE_FILES)} nor a {SHARD}* file"
    return None


def _folder_problem(path: Path, manifest: dict[str, Any]) -> str | None:
    number = path.name.removeprefix("step_")
    if path.name.startswith("step_") and number.isdecimal() and int(number) != manifest["step"]:
        return f"step {manifest['step']} is not that of the folder"
    unlisted = sorted(
        file.name for file in path.glob("*.safetensors") if file.name not in manifest["files"]
    )
    return f"files: {unlisted[0]} is in the folder and not in the list" if unlisted else None


def verify(path: Path) -> dict[str, Any]:
    """Check the size and SHA-256 of every file of a checkpoint and return its manifest.

    Raises:
        ValueError: Names the file that is missing, truncated, changed or unreadable.
    """
    manifest = load(path)
    files = manifest["files"]
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size if file.exists() else -1
            if size < 0:
                raise ValueError(f"{path.name}/{name} is missing")
            if size != expected["bytes"]:
                raise ValueError(
                    f"{path.name}/{name} is truncated: {size} bytes of {expected['bytes']}"
                )
            if _sha256(file) != expected["sha256"]:
                raise ValueError(
                    f"{path.name}/{name} is damaged: its SHA-256 is not the manifest's"
                )
        except OSError as error:
            raise ValueError(
                f"{path.name}/{name} cannot be read: {durable_files.reason(error)}"
            ) from None
    return manifest


def described(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the manifest's entry for each file: its size in bytes and its SHA-256."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}


def finish(final: Path, writing: Path, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """Complete a checkpoint: write its manifest, set the modes of its files, fsync and rename it."""
    (writing / MANIFEST).write_text(dumps(manifest | {"files": files}), encoding="utf-8")
    for path in writing.iterdir():
        durable_files.allow_as_usual(path, like=writing / MANIFEST)  # safetensors makes 0600
        durable_files.sync(path)
    durable_files.sync_folder(writing)
    os.rename(writing, final)
    durable_files.sync_folder(final.parent)


def prune(written: Path, keep_last: int, keeps: Callable[[int], bool]) -> None:
    """Remove old checkpoints of a run.

    Args:
        written: The checkpoint just written. It is intact, and folders of later steps are left alone.
        keep_last: Number of newest checkpoints to keep up to and including `written`, at least 1.
        keeps: Returns True for a step whose checkpoint is kept forever.
    """
    found = [path for path in checkpoints(written.parent.parent) if _step(path) <= _step(written)]
    for path in found[: -max(1, keep_last)]:
        if not keeps(_step(path)):
            shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
