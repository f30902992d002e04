"""What happens when gradients are not finite: the step is masked (optim.py), and here counted, recorded, answered.

Up to `max_skipped_steps` in a row are passed over. Then the weights go back to the newest checkpoint, while the data go on,
so that the run does not meet the same batch in the same state; after `max_rollbacks` of those, the run stops. What skipped batches
were made of is kept in `<run>/skipped/`, for `python -m ssl_pretrain.replay RUN STEP`: the sample numbers, the seed and the epoch, of
which every draw is a function, and the checkpoint whose weights they met.
"""

from __future__ import annotations

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
    """How many bad steps and rollbacks a run survives."""

    max_skipped_steps: int = setting(
        10, "Consecutive steps with a gradient that is not finite before a rollback.", minimum=1
    )
    max_rollbacks: int = setting(1, "Rollbacks per process before the run ends. 0: none.")


class Guard:
    """Reads the device every `every_steps`, as the logger does.

    Args:
        run: the run's folder.
        broken: says which embeddings are not finite; asked on every rank.
        roll_back: loads the newest checkpoint's weights and optimizer state, and says which; None where there is none.
        drawn: `seed` and `steps_per_epoch`.
    """

    def __init__(
        self, config: GuardConfig, run: Path, every_steps: int, broken: Callable[[], str], roll_back: Callable[[], str | None],
        drawn: dict[str, int],
    ):  # fmt: skip
        self.config, self.run, self.every_steps, self.drawn = config, run, every_steps, drawn
        self._went_back: dict[
            str, int
        ] = {}  # the last rollback: after this step, to the checkpoint of that one
        self.broken, self.roll_back = broken, roll_back
        self.rollbacks, self._streak = 0, 0
        self._seen: list[
            tuple[int, Tensor, Tensor]
        ] = []  # step, skipped, the batch's sample numbers

    def after(self, step: int, indices: Tensor, logs: dict[str, Tensor]) -> None:
        """Takes a step's outcome; at the interval rolls back or stops where too many were skipped.

        Raises:
            FloatingPointError: they still are after the last rollback, or there is nothing to go back to.
        """
        self._seen.append((step, logs["skipped_steps"], indices))
        if step % self.every_steps and len(self._seen) < self.every_steps:
            return
        flags = torch.stack(
            [skipped for _, skipped, _ in self._seen]
        ).tolist()  # the same on every rank
        for (number, _, numbers), flag in zip(self._seen, flags):
            self._streak = self._streak + 1 if flag else 0
            if flag:
                self._record(number, numbers)
        self._seen.clear()
        if self._streak >= self.config.max_skipped_steps:
            self._answer(step)

    def _answer(self, step: int) -> None:
        where = self.broken()
        what = f"step {step}: {self._streak} steps in a row had a non-finite gradient"
        what += f"; not finite embeddings: {where}" if where else ""
        restored = self.roll_back() if self.rollbacks < self.config.max_rollbacks else None
        if restored is None:
            command = shlex.join(["python", "-m", "ssl_pretrain.replay", str(self.run), str(step)])
            raise FloatingPointError(
                f"{what}; the weights are those of the last finite step. Lower optim.base_lr, lengthen optim.warmup_epochs, or train in "
                f"float32; resuming goes on from the last checkpoint. `{command}` repeats that step"
            )
        self.rollbacks += 1
        self._streak = 0
        self._went_back = {
            "rolled_back_after": step,
            "rolled_back_to": int(restored.rpartition("_")[2]),
        }
        if process_group.is_main():
            print(
                f"{what}; weights and optimizer went back to {restored}, the data go on", flush=True
            )

    def _record(self, step: int, indices: Tensor) -> None:
        numbers = collectives.gather(indices).tolist()
        if process_group.is_main():
            path = self.run / "skipped" / f"step_{step:08d}.json"
            epoch = (step - 1) // self.drawn["steps_per_epoch"]
            facts = {
                "step": step,
                "seed": self.drawn["seed"],
                "epoch": epoch,
                **self._went_back,
                "indices": numbers,
            }
            try:
                path.parent.mkdir(exist_ok=True)
                durable_files.replace(path, json.dumps(facts))
            except OSError as error:  # the run is worth more than the note
                warnings.warn(
                    f"{path} could not be written: {durable_files.reason(error)}; that step cannot be replayed",
                    stacklevel=2,
                )
