"""Recover from steps whose gradient is not finite.

The optimizer masks such a step on the device, so no weight moves. `NanGuard` counts the skipped
steps and records their images in `<run>/skipped/`, where `python -m ssl_pretrain.replay RUN STEP`
finds them. After `max_skipped_steps` in a row it restores the newest checkpoint. The data order is
not rewound, so the run does not meet the same batch in the same state again. After `max_rollbacks`
restores the run ends with an error.
"""

import json
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.schema import setting
from ssl_pretrain.system import durable_files


@dataclass
class GuardConfig:
    """Limits on skipped steps and rollbacks."""

    max_skipped_steps: int = setting(
        10, "Consecutive steps with a gradient that is not finite before a rollback.", minimum=1
    )
    max_rollbacks: int = setting(
        1, "Rollbacks per process before the run ends. 0 disables rollbacks.", unit="rollbacks"
    )


class NanGuard:
    """Record skipped steps, and roll back or end the run after too many of them.

    Args:
        config: The limits.
        run: Folder of the run.
        every_steps: Steps between two reads of the device, as in the logger.
        seed: Seed of the run, recorded with each skipped step.
        steps_per_epoch: Optimizer steps per epoch.
        describe_nonfinite_embeddings: Function that names the embeddings that are not finite, or
            returns an empty text. It is called on every rank.
        roll_back: Function that restores the newest checkpoint and returns its name. It returns
            None if there is no checkpoint.
    """

    def __init__(
        self,
        config: GuardConfig,
        run: Path,
        every_steps: int,
        *,
        seed: int,
        steps_per_epoch: int,
        describe_nonfinite_embeddings: Callable[[], str],
        roll_back: Callable[[], str | None],
    ):
        self.config, self.run, self.every_steps = config, run, every_steps
        self.seed, self.steps_per_epoch = seed, steps_per_epoch
        self._describe_nonfinite_embeddings, self._roll_back = (
            describe_nonfinite_embeddings,
            roll_back,
        )
        self._num_rollbacks = self._num_skipped_in_a_row = 0
        self._last_rollback: dict[str, int] = {}  # steps before and after the rollback
        # Step, skipped flag and image indices of each step whose flag was not read yet.
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def check(self, step: int, indices: Tensor, logs: dict[str, Tensor]) -> None:
        """Record whether a step was skipped, and roll back or stop after too many skipped steps.

        The device is read every `every_steps` steps.

        Args:
            step: Optimizer steps done.
            indices: Indices of this rank's images.
            logs: Scalars of the step. `skipped_steps` is 1 for a step that was masked.

        Raises:
            FloatingPointError: If too many steps were skipped, and `max_rollbacks` is reached or
                there is no checkpoint.
        """
        self._pending.append((step, logs["skipped_steps"], indices))
        if step % self.every_steps and len(self._pending) < self.every_steps:
            return
        flags = torch.stack([skipped for _, skipped, _ in self._pending]).tolist()
        # The flags are the same on all ranks.
        for (pending_step, _, batch_indices), skipped in zip(self._pending, flags):
            self._num_skipped_in_a_row = self._num_skipped_in_a_row + 1 if skipped else 0
            if skipped:
                self._record(pending_step, batch_indices)
        self._pending.clear()
        if self._num_skipped_in_a_row >= self.config.max_skipped_steps:
            self._recover(step)

    def _recover(self, step: int) -> None:
        problem = (
            f"step {step}: {self._num_skipped_in_a_row} steps in a row had a non-finite gradient"
        )
        if nonfinite_embeddings := self._describe_nonfinite_embeddings():
            problem += f"; embeddings that are not finite: {nonfinite_embeddings}"
        may_roll_back = self._num_rollbacks < self.config.max_rollbacks
        checkpoint = self._roll_back() if may_roll_back else None
        if checkpoint is None:
            command = shlex.join(["python", "-m", "ssl_pretrain.replay", str(self.run), str(step)])
            raise FloatingPointError(
                f"{problem}. The weights are those of the last finite step. Lower optim.base_lr, "
                "lengthen optim.warmup_epochs, or train in float32. The same command resumes from "
                f"the last checkpoint. `{command}` repeats this step alone"
            )
        self._num_rollbacks += 1
        self._num_skipped_in_a_row = 0
        self._last_rollback = {
            "rolled_back_after": step,
            "rolled_back_to": int(checkpoint.rpartition("_")[2]),
        }
        process_group.print_once(
            f"{problem}. Weights and optimizer were restored from {checkpoint}. "
            "Training continues with the next images",
        )

    def _record(self, step: int, indices: Tensor) -> None:
        all_indices = collectives.gather(indices).tolist()
        if not process_group.is_main():
            return
        path = self.run / "skipped" / f"step_{step:08d}.json"
        record = {
            "step": step,
            "seed": self.seed,
            "epoch": (step - 1) // self.steps_per_epoch,
            **self._last_rollback,
            "indices": all_indices,
        }
        try:
            path.parent.mkdir(exist_ok=True)
            durable_files.replace(path, json.dumps(record))
        except OSError as error:  # a missing record is no reason to end the run
            warnings.warn(
                f"{path} could not be written: {durable_files.describe_error(error)}; "
                "that step cannot be replayed",
                stacklevel=2,
            )
