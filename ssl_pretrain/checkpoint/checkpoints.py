"""Save a run's checkpoints and resume from them, bit for bit."""

import uuid
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_pretrain.checkpoint import folder, rank_agreement, tensor_files
from ssl_pretrain.checkpoint import manifest as manifests
from ssl_pretrain.checkpoint.save_thread import SaveThread
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.schema import setting
from ssl_pretrain.system.durable_files import SaveError

# Called with `saved_config`, the configuration in a checkpoint's manifest, and `path`, the path of
# the checkpoint. Raises ValueError if this run may not continue from it.
ConfigCheck = Callable[..., None]


@dataclass
class CheckpointConfig:
    """Settings for saving, keeping and resuming from checkpoints."""

    every_epochs: float = setting(5.0, "Epochs between two checkpoints.")
    keep_last: int = setting(2, "Number of newest checkpoints to keep on disk.", unit="checkpoints")
    keep_every_epochs: float = setting(
        0.0,
        "Checkpoints at multiples of this many epochs are never deleted. 0 protects none.",
    )
    asynchronous: bool = setting(
        True,
        "Write to disk while training continues. Training only waits for the copy to host memory.",
    )
    on_failure: Literal["stop", "warn"] = setting(
        "stop",
        "Reaction to a checkpoint that cannot be written. stop ends the run. warn continues it and "
        "tries again at the next save. If the last save of a run fails, the run always ends.",
    )
    resume: bool = setting(
        True,
        "Continue from the newest checkpoint in `output`. false refuses an output that has one.",
    )


@dataclass
class RunFacts:
    """Entries of a manifest that do not follow from the configuration alone.

    Each field is stored under its own name. `schema.RENAMED_KEYS` lists the names that older
    checkpoints use.
    """

    last_step: int  # optimizer steps of the whole run
    micro_batch_size: int  # images per forward pass on each rank
    data: str  # fingerprint of the training images
    precision: str = "float32"  # data type of the computation, with `auto` replaced
    wandb_id: str | None = None  # kept when the run resumes, so that W&B shows one run


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: Folder of the run.
        state: The tensors to save and restore.
        settings: When to save, and which checkpoints to keep.
        facts: Facts about the run. Each manifest stores their values at the time of the save.
        config: The resolved configuration as plain values, for the manifest.
        steps_per_epoch: Optimizer steps per epoch.
        check_lock: Called before every save. Raises if another run has taken over the folder.
    """

    def __init__(
        self,
        run: Path,
        state: TrainingState,
        settings: CheckpointConfig,
        facts: RunFacts,
        config: dict[str, Any],
        steps_per_epoch: int,
        check_lock: Callable[[], None] = lambda: None,
    ):
        self.run, self.state, self.settings, self.facts = run, state, settings, facts
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self._check_lock, self._thread = check_lock, SaveThread()

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is due after this step, or if the step is the last."""
        at_interval = _crosses_multiple(step, self.settings.every_epochs * self.steps_per_epoch)
        return step == self.facts.last_step or at_interval

    def save(self, step: int, wait: bool = True) -> None:
        """Write the checkpoint of a step, and prune older ones.

        An asynchronous save copies the state to host memory, and a thread writes it while training
        continues.

        Args:
            step: Optimizer steps done.
            wait: Return only when the checkpoint is on disk. Used for the last save of a process.

        Raises:
            SaveError: If this save or the previous one failed. Older checkpoints are
                untouched, and the incomplete one is removed. With `wait`, `on_failure` does not
                apply to this save, because its weights exist nowhere else.
        """
        self._check_lock()
        earlier_problem, problem = self._thread.wait(), None
        waits_for_disk = wait or not self.settings.asynchronous
        path = folder.checkpoint_path(self.run, step)
        staging_name = f"{folder.STAGING_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
        if self.state.is_sharded:  # the ranks write into one folder
            staging_name = collectives.broadcast_object(staging_name)
        if self.state.is_sharded or process_group.is_main():
            # Without a copy, nothing may change until the tensors are on disk.
            tensors_by_file = self.state.snapshot(copies_host=not waits_for_disk)
            manifest = self._build_manifest(step)

            def write() -> None:
                self._write_and_prune(path, path.with_name(staging_name), tensors_by_file, manifest)

            self._thread.start(write, step, path.parent)
        if waits_for_disk:
            problem = self._thread.wait()
        earlier_problem, problem = collectives.broadcast_object((earlier_problem, problem))
        if problem and wait:  # no later save would make up for it
            raise SaveError(problem)
        for text in filter(None, (problem, earlier_problem)):
            if self.settings.on_failure == "stop":
                raise SaveError(text)
            if process_group.is_main():
                warnings.warn(text, stacklevel=2)

    def resume(self, check_config: ConfigCheck) -> int:
        """Prepare the run's folder and restore its newest intact checkpoint.

        Args:
            check_config: Raises if this run may not continue from a checkpoint's configuration.

        Returns:
            The number of steps done so far, which is 0 for a new run.

        Raises:
            ValueError: If the run cannot resume with this configuration or these images, if
                resuming is off, or if all checkpoints are damaged.
        """
        folder.prepare_folder(self.run)
        rank_agreement.check_checkpoints(self.run)
        checkpoints = folder.list_checkpoints(self.run)
        if not checkpoints:
            return 0
        if not self.settings.resume:
            raise ValueError(
                f"output: {self.run} already has {checkpoints[-1].name} and checkpoint.resume is "
                "false; give another output, or set checkpoint.resume=true"
            )
        path = folder.newest_checkpoint(self.run)
        manifest = manifests.read_manifest(path)
        check_config(saved_config=manifest["config"], path=str(path))
        if manifest.get("data", self.facts.data) != self.facts.data:
            raise ValueError(
                f"data.root: the training images are not those that {self.run} was trained on "
                "(their files, labels or pixels differ); give that data set, or a new output with "
                f"backbone.init={self.run}"
            )
        machine = self._describe_machine()
        differences = [
            f"{key} was {value!r} and is now {machine.get(key)!r}"
            for key, value in manifest["machine"].items()
            if machine.get(key) != value
        ]
        if differences and process_group.is_main():
            warnings.warn(
                f"{path.name}: resuming is exact up to rounding, not bit for bit: "
                f"{'; '.join(differences)}",
                stacklevel=2,
            )
        self.state.restore(path)
        self.facts.wandb_id = self.facts.wandb_id or manifest.get("wandb_id")
        return int(manifest["step"])

    def wait_for_disk(self) -> None:
        """Wait until no rank is writing a checkpoint."""
        self._thread.wait()

    def roll_back(self) -> str | None:
        """Restore the newest intact checkpoint and return its name, or None if there is none."""
        self._thread.wait()
        collectives.barrier()
        if not folder.list_checkpoints(self.run):
            return None
        path = folder.newest_checkpoint(self.run)
        self.state.restore(path)
        return path.name

    def _write_and_prune(
        self,
        path: Path,
        staging_folder: Path,
        tensors_by_file: tensor_files.TensorsByFile,
        manifest: dict[str, Any],
    ) -> None:
        self._check_lock()
        if self.state.is_sharded:
            tensor_files.write_shards(
                path, staging_folder, tensors_by_file, manifest, group=self.state.group
            )
        else:
            tensor_files.write_full_tensors(path, staging_folder, tensors_by_file, manifest)
        if process_group.is_main():
            interval = self.settings.keep_every_epochs * self.steps_per_epoch
            folder.prune(
                path, self.settings.keep_last, lambda step: _crosses_multiple(step, interval)
            )

    def _build_manifest(self, step: int) -> dict[str, Any]:
        return {
            "format": manifests.FORMAT,
            "step": step,
            "evaluated": getattr(self.state.method, "evaluated_module", "backbone"),
            "network": getattr(self.state.method, "evaluated_network", "student"),
            "versions": manifests.list_versions(),
            "machine": self._describe_machine(),
            **asdict(self.facts),
            "config": self.config,
        }

    def _describe_machine(self) -> dict[str, Any]:
        """Describe what must stay the same for a bit-for-bit resume."""
        parallel = self.config.get("parallel", {})
        modes = {key: parallel[key] for key in ("strategy", "compile") if key in parallel}
        facts = {
            "micro_batch_size": self.facts.micro_batch_size,
            "precision": self.facts.precision,
        }
        return manifests.describe_machine() | facts | modes


def _crosses_multiple(step: int, interval: float) -> bool:
    """Return True if a multiple of the interval lies in (step - 1, step]."""
    return interval > 0 and step > 0 and int(step / interval) > int((step - 1) / interval)


def finished_step(
    run: Path, settings: CheckpointConfig, epochs: float, check_config: ConfigCheck
) -> int | None:
    """Return the last step of a run that has nothing left to train, or None for any other run.

    Nothing is written. Only rank 0 reads the checkpoints.

    Raises:
        ValueError: If the run has already trained for these epochs with another configuration.
    """

    def read_step() -> int | None:
        path = folder.newest_checkpoint_after(run, epochs)
        if path is None:
            return None
        manifest = manifests.read_manifest(path)
        saved_epochs, step = manifest["config"]["epochs"], int(manifest["step"])
        if saved_epochs != epochs:
            raise ValueError(
                f"epochs: {epochs} leaves nothing to train: {run} has reached step {step} with "
                f"epochs={saved_epochs}. Nothing was changed; leave epochs at {saved_epochs}, "
                "or give a new output"
            )
        check_config(saved_config=manifest["config"], path=str(path))
        return step

    return collectives.run_on_main(read_step) if settings.resume else None
