"""Find, publish and prune the checkpoints of a run in `<run>/checkpoints`.

The checkpoint of step 1000 is the folder `step_00001000`. It is written under a name that begins
with `.writing-`, fsynced and renamed, so it is either complete or absent. A checkpoint that was
damaged later is detected by its hashes, reported, and skipped in favor of the one before it.
"""

import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.checkpoint import manifest as manifests
from ssl_pretrain.distributed import collectives
from ssl_pretrain.system import durable_files

STAGING_PREFIX = ".writing-"


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of a step, whether or not it exists."""
    return Path(run) / "checkpoints" / f"step_{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def list_checkpoints(run: str | Path) -> list[Path]:
    """Return the run's checkpoint folders sorted by step, including damaged ones."""
    paths = (Path(run) / "checkpoints").glob("step_*")
    return sorted(
        (path for path in paths if path.is_dir() and path.name[5:].isdecimal()), key=_step_of
    )


def newest_checkpoint(run: str | Path) -> Path:
    """Return the newest intact checkpoint. Damaged ones are skipped with a warning.

    Raises:
        ValueError: If the run has no checkpoint, or all of them are damaged.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(
            f"{run}: no checkpoint found (looked for {Path(run) / 'checkpoints' / 'step_*'}); "
            "give the folder of a run that has saved one"
        )
    problems = []
    for path in reversed(checkpoints):
        try:
            manifests.verify_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name} instead", stacklevel=2)
        return path
    raise ValueError(
        f"{run}: all {len(checkpoints)} checkpoints are damaged: {'; '.join(problems)}. "
        "Nothing was loaded. Restore one, or give a new output"
    )


def newest_checkpoint_after(run: Path, epochs: float) -> Path | None:
    """Return the newest intact checkpoint after at least `epochs` epochs, or None.

    Files are hashed only if, according to its manifest, the newest checkpoint has reached that many
    epochs.
    """

    def has_reached(path: Path) -> bool:
        try:
            manifest = manifests.read_manifest(path)
            steps_per_epoch = manifest["last_step"] / manifest["config"]["epochs"]
            return bool(manifest["step"] >= round(epochs * steps_per_epoch))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            return False

    checkpoints = list_checkpoints(run)
    if not checkpoints or not has_reached(checkpoints[-1]):
        return None
    path = newest_checkpoint(run)
    return path if has_reached(path) else None


def is_finished(run: str | Path) -> bool:
    """Return True if the newest readable manifest is from the run's last step."""
    for path in reversed(list_checkpoints(run)):
        with suppress(ValueError, KeyError):
            manifest = manifests.read_manifest(path)
            return bool(manifest["step"] >= manifest["last_step"])
    return False


def prepare_folder(run: Path) -> None:
    """Remove unfinished checkpoints and check that new ones can be written.

    Only the main rank does the work, but every rank must call this function, and an error is raised
    on all of them.

    Raises:
        ValueError: If no checkpoint can be written. The message names the folder, the failed call
            and the reason.
        SaveError: If the reason is a full or failing disk, which may be temporary.
    """

    def prepare() -> None:
        for path in (run / "checkpoints").glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
        _check_writable(run / "checkpoints")

    collectives.run_on_main(prepare)


def _check_writable(folder: Path) -> None:
    """Try every file system call that a save needs."""
    probe = folder / f"{STAGING_PREFIX}probe-{uuid.uuid4().hex[:8]}"
    new_path = probe.with_name(f"{probe.name}-renamed")
    calls: dict[str, Callable[[], Any]] = {
        "make a folder": lambda: probe.mkdir(parents=True),
        "write a file": lambda: (probe / "probe").write_bytes(bytes(4096)),
        "fsync a file": lambda: durable_files.sync(probe / "probe"),
        "fsync a folder": lambda: durable_files.sync_folder(probe),
        "rename a folder": lambda: os.rename(probe, new_path),
        "remove a folder": lambda: shutil.rmtree(new_path),
    }
    for name, call in calls.items():
        try:
            call()
        except OSError as error:
            for path in (probe, new_path):
                shutil.rmtree(path, ignore_errors=True)
            message = (
                f"output: no checkpoint can be written to {folder}: "
                f"{durable_files.describe_error(error)} ({name}); free space, "
                "get write permission, or give another output"
            )
            raise durable_files.failed_write_error(error, message) from None


def discard_if_damaged(path: Path) -> None:
    """Remove whatever is at the path of a checkpoint, unless it is an intact checkpoint.

    The target of a symbolic link is not removed.
    """
    if not os.path.lexists(path):
        return
    with suppress(ValueError):
        if path.is_dir():
            manifests.verify_checkpoint(path)
            return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def publish(
    staging_folder: Path,
    path: Path,
    manifest: dict[str, Any],
    file_entries: dict[str, dict[str, Any]],
) -> None:
    """Complete a checkpoint: write its manifest, set file modes, fsync everything, and rename it.

    Args:
        staging_folder: The folder in which the checkpoint was written.
        path: Final path of the checkpoint.
        manifest: The manifest without `files`.
        file_entries: The manifest's entry for each file, by file name.
    """
    manifest_file = staging_folder / manifests.MANIFEST_FILE
    manifest_file.write_text(
        manifests.to_json(manifest | {"files": file_entries}), encoding="utf-8"
    )
    for file in staging_folder.iterdir():
        # safetensors creates files with mode 0600.
        durable_files.copy_permissions(manifest_file, file)
        durable_files.sync(file)
    durable_files.sync_folder(staging_folder)
    os.rename(staging_folder, path)
    durable_files.sync_folder(path.parent)


def prune(newest: Path, keep_last: int, is_milestone: Callable[[int], bool]) -> None:
    """Remove old checkpoints of a run.

    Args:
        newest: The checkpoint just saved. Checkpoints of later steps are not touched.
        keep_last: Number of checkpoints to keep, including `newest`. 0 counts as 1.
        is_milestone: Returns True for steps whose checkpoints are never removed.
    """
    checkpoints = list_checkpoints(newest.parent.parent)
    paths = [path for path in checkpoints if _step_of(path) <= _step_of(newest)]
    for path in paths[: -max(1, keep_last)]:
        if not is_milestone(_step_of(path)):
            shutil.rmtree(path, ignore_errors=True)
