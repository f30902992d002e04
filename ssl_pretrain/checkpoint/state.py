"""Saves the state of a run and resumes from it bit for bit.

A checkpoint is the folder `<run>/checkpoints/step_00001000/`. It is written as `.writing-...` beside
that name, fsynced and renamed, so it is complete or absent. Its manifest lists the size and SHA-256
of every file. Tensors are safetensors files and the rest is JSON. Nothing is a pickle.

Rank 0 writes whole tensors to method.safetensors and optimizer.safetensors. Sharded tensors (FSDP)
are in one file per rank, in the safetensors storage of torch.distributed.checkpoint, where an entry
of the optimizer's state is named `<parameter>::<entry>`. Both kinds can be read on any number of
ranks, sharded or not.
"""

from __future__ import annotations

import errno
import inspect
import shutil
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssl_pretrain import schema
from ssl_pretrain.checkpoint import folder as manifests
from ssl_pretrain.checkpoint import provenance
from ssl_pretrain.checkpoint.folder import (
    FORMAT,
    MANIFEST,
    READABLE,
    WRITING,
    checkpoints,
    newest,
    prune,
    verify,
)
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models import backbones, published_weights
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.schema import setting
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.durable_files import SaveError
from ssl_pretrain.system.exit_status import DISK_REFUSED
from ssl_pretrain.system.watchdog import watchdog

DISK_PATIENCE = (
    10.0  # a save may take this multiple of parallel.timeout_seconds before the disk counts as dead
)
WHOLE = "method.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, and which ones stay."""

    every_epochs: float = setting(5.0, "Epochs between two checkpoints.")
    keep_last: int = setting(2, "Number of newest checkpoints that stay on disk.")
    keep_every_epochs: float = setting(
        0.0,
        "Checkpoints at multiples of this many epochs are never deleted. 0: no such checkpoint.",
    )
    asynchronous: bool = setting(
        True,
        "Write to disk while training continues. A step only waits for the copy to host memory.",
    )
    on_failure: Literal["stop", "warn"] = setting(
        "stop",
        "If the disk refuses a checkpoint, end the run, or warn and try again at the next save. "
        "The last save of a run always stops it.",
    )
    resume: bool = setting(
        True,
        "Continue from the newest checkpoint in `output`. false: refuse an output that has one.",
    )


def due(config: CheckpointConfig, step: int, last_step: int, steps_per_epoch: int) -> bool:
    """Return True if a checkpoint is due after `step` steps: every `every_epochs`, and at the end."""
    return step == last_step or _passed(step, config.every_epochs * steps_per_epoch)


def _passed(step: int, interval: float) -> bool:
    return interval > 0 and step > 0 and int(step / interval) > int((step - 1) / interval)


class State:
    """The state that a resumed run needs: the method's tensors, the optimizer's, and the step.

    Args:
        config: The resolved configuration as plain values, for the manifest.
        facts: Further entries of the manifest, such as the W&B run id and the micro-batch size.
        check_lock: Called before every save. Raises if another run has taken over the folder.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        facts: dict[str, Any],
        check_lock: Callable[[], None] = lambda: None,
    ):
        self.method, self.optimizer, self.config, self.facts = method, optimizer, config, facts
        self._check_lock = check_lock
        self.sharded = any(collectives.is_sharded(parameter) for parameter in method.parameters())
        if self.sharded:
            _storage()
        self._group = process_group.new_cpu_group(DISK_PATIENCE) if self.sharded else None
        self._writing = ""
        self._writer: threading.Thread | None = None
        self._problem: str | None = None

    def save(
        self,
        run: Path,
        step: int,
        settings: CheckpointConfig,
        steps_per_epoch: int,
        wait: bool = True,
    ) -> None:
        """Copy the state to host memory, write the checkpoint of `step`, and prune older ones.

        An asynchronous save is written by a thread while the training goes on.

        Args:
            wait: Return only when the checkpoint is on disk, as for the last one of a run.

        Raises:
            SaveError: The disk refused this save or the one before. Older checkpoints are untouched
                and the unfinished one is removed. With `wait` it is raised whatever `on_failure`
                says, since these weights exist nowhere else.
        """
        self._check_lock()
        earlier, problem = self._written(), None
        final = folder_of(run, step)
        name = f"{WRITING}{final.name}-{uuid.uuid4().hex[:8]}"
        if self.sharded:  # the ranks write one folder
            name = collectives.broadcast_object(name)
        if self.sharded or process_group.is_main():
            arguments = (
                final,
                final.with_name(name),
                self._snapshot(step),
                settings,
                steps_per_epoch,
            )
            self._writing = f"the checkpoint of step {step} in {final.parent}"
            self._writer = threading.Thread(target=self._write_and_prune, args=arguments)
            self._writer.start()
        if wait or not settings.asynchronous:
            problem = self._written()
        earlier, problem = collectives.broadcast_object((earlier, problem))
        if problem and wait:  # no later save makes up for it
            raise SaveError(problem)
        if (problem or earlier) and settings.on_failure == "stop":
            raise SaveError(problem or earlier)
        for text in filter(None, (earlier, problem)):
            if process_group.is_main():
                warnings.warn(text, stacklevel=2)

    def _written(self) -> str | None:
        """Wait for the current save of every rank. Return the problem of this rank's, or None."""
        self._wait_for_disk()
        problem, self._writer, self._problem = self._problem, None, None
        return problem

    def _wait_for_disk(self) -> None:
        """Wait until no rank is writing. Report a slow disk now and then, and end the run at a dead one."""
        limit, began = process_group.timeout_seconds(), time.monotonic()
        told, armed, doing = 0.0, False, f"waiting for the disk to take {self._writing}"
        advice = "the disk is slow or does not answer; see whether it can be written to, then start the run again"
        while True:
            if self._writer is not None:
                self._writer.join(min(5.0, limit / 4))
            busy = self._writer is not None and self._writer.is_alive()
            if not any(collectives.gather_objects(busy)):
                return
            if not armed:
                armed = True
                watchdog.beat(DISK_PATIENCE * limit, doing, advice, DISK_REFUSED)
            waited = time.monotonic() - began
            if waited - told > limit and process_group.is_main():
                told = waited
                print(
                    f"still {doing}, for {waited:.0f} s so far: a slow disk; the run goes on",
                    file=sys.stderr,
                    flush=True,
                )

    def _snapshot(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return copies of each file's tensors in host memory, and the manifest."""
        files = {
            WHOLE: self.method.state_dict(),
            "optimizer.safetensors": self._optimizer_tensors(),
        }

        def copied(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                key: value.detach().to("cpu", copy=True).contiguous()
                for key, value in entries.items()
            }

        return {file: copied(entries) for file, entries in files.items()}, {
            "format": FORMAT,
            "step": step,
            "evaluated": getattr(self.method, "evaluated", "backbone"),
            "network": getattr(self.method, "network", "student"),
            "versions": provenance.versions(),
            "machine": self._machine(),
            **self.facts,
            "config": self.config,
        }

    def _write_and_prune(
        self,
        final: Path,
        writing: Path,
        snapshot: Any,
        settings: CheckpointConfig,
        steps_per_epoch: int,
    ) -> None:
        try:
            self._check_lock()
            if self.sharded:
                _write_shards(final, writing, *snapshot, group=self._group)
            else:
                _write(final, writing, *snapshot)
            if process_group.is_main():
                prune(
                    final,
                    settings.keep_last,
                    lambda step: _passed(step, settings.keep_every_epochs * steps_per_epoch),
                )
        except Exception as error:
            where = (
                f"checkpoint of step {snapshot[1]['step']} could not be written to {final.parent}"
            )
            self._problem = f"{where}: {error}. Older ones are whole; free space and resume"

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}::{key}": value
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"])
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def resume(
        self, run: Path, settings: CheckpointConfig, compare: Callable[[dict[str, Any]], None]
    ) -> int:
        """Load the newest intact checkpoint of `run` and return its step, 0 if there is none.

        Args:
            compare: Called with the manifest before anything is loaded. Raises if this run may not resume from it.

        Raises:
            ValueError: There is a checkpoint and resuming is off, or all checkpoints are damaged.
        """
        found = checkpoints(run)
        if not found:
            return 0
        if not settings.resume:
            raise ValueError(
                f"output: {run} holds {found[-1].name} already and checkpoint.resume is false; give another output, or resume"
            )
        path = newest(run)
        manifest = opened(path, verified=True)
        compare(manifest)
        here = self._machine()
        recorded = {schema.RENAMED.get(key, key): old for key, old in manifest["machine"].items()}
        differing = [
            f"{key} {old!r} then, {here.get(key)!r} now"
            for key, old in recorded.items()
            if here.get(key) != old
        ]
        if differing and process_group.is_main():
            warnings.warn(
                f"{path.name}: resuming is exact but not bit for bit, as these differ: {'; '.join(differing)}",
                stacklevel=2,
            )
        self.load(path)
        self.facts = {
            **{key: manifest[key] for key in self.facts if key in manifest},
            **{k: v for k, v in self.facts.items() if v is not None},
        }
        return int(manifest["step"])

    def roll_back(self, run: Path) -> str | None:
        """Load the newest intact checkpoint and return its name, None if the run has no checkpoint."""
        self._written()
        collectives.barrier()
        if not checkpoints(run):
            return None
        path = newest(run)
        self.load(path)
        return path.name

    def load(self, path: Path) -> None:
        """Load a checkpoint into the method and the optimizer, sharded as they are in this run."""
        if self.sharded or not (path / WHOLE).exists():
            self._load_shards(path)
            return
        self.method.load_state_dict(load_file(path / WHOLE), strict=True)
        self.optimizer.state.clear()  # it may hold moments of parameters that were still frozen at the checkpoint
        for key, value in load_file(path / "optimizer.safetensors").items():
            name, _, entry = key.rpartition("::")
            parameter = self._parameter(name)
            self.optimizer.state[parameter][entry] = _state_tensor(
                parameter, value.shape, value.dtype
            ).copy_(value)

    def _load_shards(self, path: Path) -> None:
        """Read the slices that this rank holds, however the checkpoint was sharded.

        Raises:
            ValueError: The checkpoint holds other tensors than this method.
        """
        stored, wanted = _stored(path), self.method.state_dict()
        weights = {key for key in stored if "::" not in key}
        if weights != wanted.keys():
            differing = ", ".join(sorted(weights ^ wanted.keys())[:3])
            raise ValueError(
                f"{path}: not the tensors of this method; differing: {differing}. Nothing was loaded"
            )
        self.optimizer.state.clear()
        for key in stored.keys() - weights:
            name, _, entry = key.rpartition("::")
            parameter = self._parameter(name)
            value = _state_tensor(parameter, stored[key].size, stored[key].properties.dtype)
            self.optimizer.state[parameter][entry] = wanted[key] = value
        _fill(path, wanted, self._group)

    def _machine(self) -> dict[str, Any]:
        ways = {
            key: value
            for key, value in self.config.get("parallel", {}).items()
            if key in ("strategy", "compile")
        }
        return (
            provenance.machine() | {"micro_batch_size": self.facts.get("micro_batch_size")} | ways
        )

    def _parameter(self, name: str) -> nn.Parameter:
        for group in self.optimizer.param_groups:
            if name in group["names"]:
                return group["params"][group["names"].index(name)]
        raise ValueError(
            f"the checkpoint's optimizer has a state for {name!r}, which this method does not train"
        )


def _state_tensor(parameter: nn.Parameter, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return zeros for an entry of the optimizer's state, on the parameter's device.

    An entry of the parameter's shape also gets its memory layout and its sharding. The fused optimizer kernels walk
    raw memory, so a moment in another layout than its weight would be applied to the wrong elements.
    """
    if shape == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)


def _write(
    final: Path, writing: Path, tensors: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> None:
    if manifests.is_there(final):
        return
    writing.mkdir(parents=True)
    try:
        for file, entries in tensors.items():
            save_file(entries, writing / file)
        manifests.finish(final, writing, manifest, manifests.described(sorted(writing.iterdir())))
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _write_shards(
    final: Path,
    writing: Path,
    tensors: dict[str, dict[str, Tensor]],
    manifest: dict[str, Any],
    *,
    group: Any,
) -> None:
    """Write a sharded checkpoint: each rank writes and hashes its own file, and rank 0 the manifest.

    Raises:
        OSError: On every rank, if any of them could not write.
    """
    there = problem = None
    if (
        process_group.is_main()
    ):  # before the others begin: a rank that failed alone would leave them waiting
        try:
            there = manifests.is_there(final)
            if not there:
                writing.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    there, problem = collectives.broadcast_object((there, problem), group)
    if problem:
        raise OSError(problem)
    if there:
        return
    dcp, files = _storage(), {}
    try:
        together = {key: value for entries in tensors.values() for key, value in entries.items()}
        dcp.save(
            together,
            storage_writer=dcp.HuggingFaceStorageWriter(str(writing), save_distributed=True),
            process_group=group,
        )
        files = manifests.described(sorted(writing.glob(f"shard-{process_group.rank() + 1:05d}-*")))
    except dcp.CheckpointException as error:  # another rank's, too
        problem = "; ".join(
            f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()
        )
    except Exception as error:
        problem = f"rank {process_group.rank()}: {error}"
    answers = collectives.gather_objects((files, problem), group)
    problem = next((problem for _, problem in answers if problem), None)
    if process_group.is_main():
        try:
            if problem is None:
                manifests.finish(
                    final,
                    writing,
                    manifest,
                    {name: entry for files, _ in answers for name, entry in files.items()},
                )
        except OSError as error:
            problem = str(error)
        if problem:
            shutil.rmtree(writing, ignore_errors=True)
    if problem := collectives.broadcast_object(problem, group):
        raise OSError(problem)


def _storage() -> Any:
    """Return torch.distributed.checkpoint if it can write shards as safetensors rather than pickles.

    Raises:
        ValueError: This torch is too old for it.
    """
    import torch.distributed.checkpoint as dcp

    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer).parameters:
        raise ValueError(
            "parallel.strategy: sharded checkpoints need torch.distributed.checkpoint's safetensors storage, which torch "
            f"{torch.__version__} has not; install torch>=2.13, or train with parallel.strategy=ddp"
        )
    return dcp


def _stored(path: Path) -> dict[str, Any]:
    """Return the size and type of every tensor in the folder by name, from the headers of its files."""
    return _storage().HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata


def _fill(path: Path, tensors: dict[str, Tensor], group: Any = None) -> None:
    """Fill `tensors`, whole or sharded, from the folder. Without a group this process reads alone."""
    dcp = _storage()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(
            tensors,
            storage_reader=dcp.HuggingFaceStorageReader(str(path)),
            process_group=group,
            no_dist=group is None,
        )


def prepare(run: Path) -> None:
    """Check at the start of a run, on every rank, that checkpoints can be written.

    The remains of interrupted saves are removed.

    Raises:
        ValueError: Nothing can be written there. Names the place, the failed call and the reason.
        SaveError: The same for a disk that is full or failing, which may pass.
    """
    problem = collectives.broadcast_object(
        manifests.probe(run) if process_group.is_main() else None
    )
    if problem is None:
        return
    if durable_files.is_trouble(problem) and problem.errno != errno.EROFS:
        raise SaveError(problem.strerror)
    raise ValueError(problem.strerror)


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of the run's checkpoint of that step, whether it exists or not."""
    return manifests.folder(run) / f"step_{step:08d}"


def last_that_reached(run: Path, epochs: int) -> Path | None:
    """Return the newest intact checkpoint if it has reached the end of that many epochs, else None.

    Files are read and hashed only if the newest manifest promises such a checkpoint.
    """

    def reached(path: Path) -> bool:
        try:
            manifest = manifests.load(path)
            steps_per_epoch = manifest["last_step"] / manifest["config"]["epochs"]
            return bool(manifest["step"] >= round(epochs * steps_per_epoch))
        except (ValueError, KeyError, TypeError, ZeroDivisionError):
            return False

    found = checkpoints(run)
    if not found or not reached(found[-1]):
        return None
    path = newest(run)
    return path if reached(path) else None


def opened(path: Path, verified: bool = False) -> dict[str, Any]:
    """Return the manifest of an intact checkpoint folder.

    Args:
        verified: The files were verified a moment ago and are not hashed again.

    Raises:
        ValueError: A file is damaged, or this version cannot read the checkpoint's format.
    """
    manifest = manifests.load(path) if verified else verify(path)
    if manifest.get("format") not in READABLE:
        made_by = manifest.get("versions", {})
        raise ValueError(
            f"{path} has checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}; it was written by ssl_pretrain "
            f"{made_by.get('ssl_pretrain')} ({made_by.get('revision')}): use that version, or start a new run"
        )
    return manifest


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Verify a checkpoint folder and return its manifest and the method's whole tensors, on the CPU.

    Raises:
        ValueError: As `opened`.
    """
    path = Path(path)
    manifest = opened(path)
    if (path / WHOLE).exists():
        return manifest, load_file(path / WHOLE)
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in _stored(path).items()
        if "::" not in key
    }
    _fill(path, tensors)
    return manifest, tensors


def evaluated_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the manifest and the weights of the network to evaluate, named as in a backbone."""
    manifest, tensors = read(path)
    prefix = f"{manifest['evaluated']}."
    return manifest, {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def weights_to_start_from(init: str, key: str = "") -> dict[str, Tensor] | None:
    """Return the weights that `backbone.init` names: of a run, a .safetensors file or a torch file.

    Return None for `random` and `timm:<tag>`, which the backbone's constructor handles.

    Raises:
        ValueError: There is no such file or run, or a file of another kind.
    """
    return _initial_weights(init, key)[0]


def _initial_weights(init: str, key: str) -> tuple[dict[str, Tensor] | None, list[str]]:
    if init == "random" or init.startswith("timm:"):
        return None, []
    path = Path(init)
    if init and path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
        if files and not (path / MANIFEST).exists():
            raise ValueError(
                f"backbone.init: {init!r} is a folder; give a file of it, such as {path / files[0]}"
            )
        folder = path if (path / MANIFEST).exists() else newest(path)
        return evaluated_weights(folder)[1], []
    if not init or not path.exists():
        raise ValueError(
            f"backbone.init: {init!r} does not exist; give random, timm:<tag>, a weights file or the folder of a run"
        )
    return published_weights.read_file(path, f"backbone.init: {init!r}", key)


def initialize(backbone: nn.Module, config: BackboneConfig) -> list[str]:
    """Load the weights that `backbone.init` names. Return notes on what was left out or converted.

    Raises:
        ValueError: They cannot be read, or are not this backbone's.
    """
    weights, notes = _initial_weights(config.init, config.init_key)
    if weights is None:
        return []
    return notes + backbones.load_strict(
        backbone, weights, f"backbone.init: {config.init!r}", config.init_prefix
    )
