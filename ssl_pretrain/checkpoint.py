"""Whole or absent: a run's state on disk, resumed bit for bit. Tensors are safetensors, the rest is JSON; never a pickle.

A checkpoint is the folder `<run>/checkpoints/step_00001000/`, written beside as `.writing-...`, fsynced and renamed.
Its manifest holds the size and SHA-256 of every file, so a damaged one is known by name and the one before it is used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import threading
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_pretrain import distributed

FORMAT = 1
MANIFEST = "manifest.json"
WRITING = ".writing-"


class SaveError(OSError):
    """The disk refused a checkpoint; older ones are untouched."""


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_epochs: float = 5.0
    keep_last: int = 2
    keep_every_epochs: float = 0.0  # these are never pruned; 0: none
    asynchronous: bool = True  # written to disk while the training goes on; a step waits for the copy to host memory alone
    on_failure: Literal["stop", "warn"] = "stop"  # where the disk refuses: end the run, or say so and try again at the next save
    resume: bool = True  # go on from the newest checkpoint of `output`; false refuses an output that has one


def due(config: CheckpointConfig, step: int, last_step: int, steps_per_epoch: int) -> bool:
    """Whether to save after `step` steps: at multiples of every_epochs, and at the end."""
    return step == last_step or _passed(step, config.every_epochs * steps_per_epoch)


def _passed(step: int, interval: float) -> bool:
    return interval > 0 and step > 0 and int(step / interval) > int((step - 1) / interval)


def machine() -> dict[str, Any]:
    """What must be the same for a resumed run to be bit for bit the one that never stopped."""
    return {"world_size": distributed.world_size(), "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": _cpu_name()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("ssl_pretrain", "torch", "torchvision", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"revision": _revision()}


@functools.cache
def _revision() -> str:
    """Of the code, where it is a git checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


class State:
    """All that a resumed run needs: the method's tensors, the optimizer's, and the step.

    Args:
        config: the resolved configuration, as plain values, for the manifest.
        facts: further entries of the manifest, such as the W&B run id and the part size.
    """

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], facts: dict[str, Any]):
        self.method, self.optimizer, self.config, self.facts = method, optimizer, config, facts
        self._writer: threading.Thread | None = None
        self._problem: str | None = None

    def save(self, run: Path, step: int, settings: CheckpointConfig, steps_per_epoch: int, wait: bool = True) -> None:
        """Copies everything to host memory, then writes `step` and prunes, on rank 0 and, if asynchronous, beside the training.

        Args:
            wait: return only once it is on disk, as for the last of a run; without, an asynchronous save goes on behind.

        Raises:
            SaveError: the disk refused, now or at the save before; older checkpoints are untouched, the unfinished one is removed.
        """
        problem = self._written()
        if distributed.is_main():
            arguments = (_folder(run) / f"step_{step:08d}", self._snapshot(step), settings, steps_per_epoch)
            self._writer = threading.Thread(target=self._write_and_prune, args=arguments)
            self._writer.start()
        if wait or not settings.asynchronous:
            problem = self._written() or problem
        problem = distributed.broadcast_object(problem)
        if problem and settings.on_failure == "stop":
            raise SaveError(problem)
        if problem and distributed.is_main():
            warnings.warn(problem, stacklevel=2)

    def _written(self) -> str | None:
        """Waits for the save under way; what went wrong with it, if anything."""
        if self._writer is not None:
            self._writer.join()
        problem, self._writer, self._problem = self._problem, None, None
        return problem

    def _snapshot(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The tensors of each file, on the host and no longer the training's; and the manifest."""
        files = {"method.safetensors": self.method.state_dict(), "optimizer.safetensors": self._optimizer_tensors()}

        def copied(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in entries.items()}

        return {file: copied(entries) for file, entries in files.items()}, {
            "format": FORMAT,
            "step": step,
            "evaluated": getattr(self.method, "evaluated", "backbone"),
            "network": getattr(self.method, "network", "student"),
            "versions": _versions(),
            "machine": self._machine(),
            **self.facts,
            "config": self.config,
        }

    def _write_and_prune(self, final: Path, snapshot: Any, settings: CheckpointConfig, steps_per_epoch: int) -> None:
        try:
            _write(final, *snapshot)
            _prune(final, settings, steps_per_epoch)
        except Exception as error:
            where = f"checkpoint of step {snapshot[1]['step']} could not be written to {final.parent}"
            self._problem = f"{where}: {error}. Older ones are whole; free space and resume"

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}::{key}": value
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def resume(self, run: Path, settings: CheckpointConfig, compare: Callable[[dict[str, Any]], None]) -> int:
        """Loads the newest whole checkpoint of `run` and returns its step; 0 where there is none.

        Args:
            compare: called with the manifest before anything is loaded; raises where the run may not go on.

        Raises:
            ValueError: there is a checkpoint and resuming is off, or all of them are damaged.
        """
        found = checkpoints(run)
        if not found:
            return 0
        if not settings.resume:
            raise ValueError(f"output: {run} holds {found[-1].name} already and checkpoint.resume is false; give another output, or resume")
        path = newest(run)
        manifest, tensors = read(path)
        compare(manifest)
        here = self._machine()
        differing = [f"{key} {old!r} then, {here.get(key)!r} now" for key, old in manifest["machine"].items() if here.get(key) != old]
        if differing and distributed.is_main():
            warnings.warn(f"{path.name}: resuming is exact but not bit for bit, as these differ: {'; '.join(differing)}", stacklevel=2)
        self.load(path, tensors)
        self.facts = {
            **{key: manifest[key] for key in self.facts if key in manifest},
            **{k: v for k, v in self.facts.items() if v is not None},
        }
        return int(manifest["step"])

    def roll_back(self, run: Path) -> str | None:
        """Loads the weights and the optimizer's state of the newest whole checkpoint and returns its name; None where there is none."""
        self._written()
        distributed.barrier()
        if not checkpoints(run):
            return None
        path = newest(run)
        self.load(path, read(path)[1])
        return path.name

    def load(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """The method's `tensors` and the optimizer's state of the checkpoint `path`."""
        self.method.load_state_dict(tensors, strict=True)
        for key, value in load_file(path / "optimizer.safetensors").items():
            name, _, entry = key.rpartition("::")
            parameter = self._parameter(name)
            self.optimizer.state[parameter][entry] = value.to(parameter.device)

    def _machine(self) -> dict[str, Any]:
        return machine() | {"local_batch_size": self.facts.get("local_batch_size")}

    def _parameter(self, name: str) -> nn.Parameter:
        for group in self.optimizer.param_groups:
            if name in group["names"]:
                return group["params"][group["names"].index(name)]
        raise ValueError(f"the checkpoint's optimizer has a state for {name!r}, which this method does not train")


def _write(final: Path, tensors: dict[str, dict[str, Tensor]], manifest: dict[str, Any]) -> None:
    if final.exists():  # resumed from it, or saved by the same step already; or damaged, and reached again from the one before
        with suppress(ValueError):
            verify(final)
            return
        shutil.rmtree(final)
    writing = final.with_name(f"{WRITING}{final.name}-{uuid.uuid4().hex[:8]}")
    writing.mkdir(parents=True)
    try:
        for file, entries in tensors.items():
            save_file(entries, writing / file)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(writing.iterdir())}
        (writing / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1))
        for path in [*writing.iterdir(), writing]:
            _fsync(path)
        os.rename(writing, final)
        _fsync(final.parent)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def checkpoints(run: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first by their step numbers, whole or not."""
    return sorted((path for path in _folder(Path(run)).glob("step_*") if path.is_dir() and path.name[5:].isdecimal()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def prepare(run: Path) -> None:
    """Removes what an interrupted save left, and writes a little, as a save would: for the start of a run, on every rank.

    Raises:
        ValueError: nothing can be written there; names the place and the system's reason.
    """
    problem = distributed.broadcast_object(_probe(_folder(run)) if distributed.is_main() else None)
    if problem:
        raise ValueError(problem)


def _probe(folder: Path) -> str | None:
    probe = folder / f"{WRITING}probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{WRITING}*"):
            shutil.rmtree(path, ignore_errors=True)
        probe.mkdir()
        (probe / "probe").write_bytes(bytes(4096))
        _fsync(probe / "probe")
        shutil.rmtree(probe)
    except OSError as error:
        return (
            f"output: no checkpoint can be written to {folder}: {error.strerror or error}; "
            "make room or give the right to write there, or give another output"
        )
    return None


def newest(run: str | Path) -> Path:
    """The newest whole checkpoint; a damaged one is named in a warning and passed over.

    Raises:
        ValueError: the run has none, or none that is whole.
    """
    found = checkpoints(run)
    if not found:
        raise ValueError(
            f"{run}: no checkpoint there (looked for {_folder(Path(run)) / 'step_*'}); give the folder of a run that has saved one"
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


def verify(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint, once every file has the size and SHA-256 it says.

    Raises:
        ValueError: names the file that is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path.name}/{MANIFEST} cannot be read ({type(error).__name__})") from None
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


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(manifest, the method's tensors on CPU) of one checkpoint folder, verified.

    Raises:
        ValueError: a file is damaged, or the checkpoint is of another format than this version's.
    """
    manifest = verify(Path(path))
    if manifest.get("format") != FORMAT:
        made_by = manifest.get("versions", {})
        raise ValueError(
            f"{path} has checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}; it was written by ssl_pretrain "
            f"{made_by.get('ssl_pretrain')} ({made_by.get('revision')}): use that version, or start a new run"
        )
    return manifest, load_file(Path(path) / "method.safetensors")


def evaluated_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(manifest, weights of the network that evaluations judge), names as in a backbone."""
    manifest, tensors = read(path)
    prefix = f"{manifest['evaluated']}."
    return manifest, {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def weights_to_start_from(init: str) -> dict[str, Tensor] | None:
    """The weights that `backbone.init` names: a run folder, a .safetensors file, or a .pth file of tensors alone.

    None for `random` and `timm:<tag>`, which the backbone's constructor knows.

    Raises:
        ValueError: no such file or run, or a file of another kind.
    """
    if init == "random" or init.startswith("timm:"):
        return None
    path = Path(init)
    if path.is_dir():
        folder = path if (path / MANIFEST).exists() else newest(path)
        return evaluated_weights(folder)[1]
    if not path.exists():
        raise ValueError(f"backbone.init: {init!r} does not exist; give random, timm:<tag>, a weights file or the folder of a run")
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises anything
        raise ValueError(
            f"backbone.init: {init!r} is not a readable weights file ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from None
    inner = weights.get("state_dict")
    return inner if isinstance(inner, dict) else weights


def _prune(written: Path, settings: CheckpointConfig, steps_per_epoch: int) -> None:
    """Removes all but the last few up to the one just written, which is whole, whatever lies there under a higher number."""
    found = [path for path in checkpoints(written.parent.parent) if _step(path) <= _step(written)]
    for path in found[: -max(1, settings.keep_last)]:
        if not _passed(_step(path), settings.keep_every_epochs * steps_per_epoch):
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
