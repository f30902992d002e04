"""Training runs over tar shards whose processes record the batches that they take."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ranks import Ranks
from tars import digest

from ssl_pretrain import step
from ssl_pretrain.distributed import collectives, process_group

# The loader has its shipped settings.
YAML = """
method: {name: simclr, projector_dims: [16, 8]}
backbone: {name: test_resnet, stem: no_pool}
data: {source: folder}
views:
  crops:
    global: {count: 2, size: 8, jitter: 0.8, hue: 0.1}
parallel: {threads: 1}
online: {knn_every_epochs: 0}
checkpoint: {keep_last: 1}
log: {wandb: "off"}
optim: {name: sgd, warmup_epochs: 0}
"""


def record_batches(folder: Path, kill_at: int = -1, hold_at: int = -1) -> None:
    """Make this process write the digest of each image's views, labels and index before a step.

    Args:
        folder: Folder of the records, one file per process.
        kill_at: Step before which the process kills itself, after the record.
        hold_at: Step before which the process waits for the file `continue` in the folder.
    """
    take_step = step.Stepper.__call__

    def take_recorded_step(stepper, progress, batch):
        rows = [digest(batch.rows(slice(row, row + 1))) for row in range(len(batch.labels))]
        with open(folder / str(os.getpid()), "a") as file:
            file.write(json.dumps([progress.step, process_group.rank(), rows]) + "\n")
        if progress.step == hold_at:
            (folder / "holding").touch()
            while not (folder / "continue").exists():
                time.sleep(0.01)
        if progress.step == kill_at:
            collectives.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(stepper, progress, batch)

    step.Stepper.__call__ = take_recorded_step


class RecordedRun:
    """A run in one output folder, in one or several segments on other numbers of ranks."""

    def __init__(self, folder: Path, root: str, *overrides: str):
        folder.mkdir()
        self.folder, self.config = folder, folder / "run.yaml"
        self.config.write_text(
            f"{YAML.replace('data: {', f'data: {{root: {root!r}, cache_dir: {folder}/cache, ')}"
            f"output: {folder / 'run'}\n"
        )
        self.overrides = overrides
        self.steps: dict[int, list[str]] = {}  # digests of a step's images, in their order
        self.num_repeated = 0  # steps that were taken twice, because the first time was lost
        self.num_segments = 0

    def train(
        self,
        world_size: int,
        *arguments: str,
        environment: dict[str, str] | None = None,
        during_hold: Callable[[], None] | None = None,
        **record_options: int,
    ) -> list[int]:
        """Train on ranks until they exit. Return their statuses, and keep their records.

        Args:
            world_size: Number of ranks.
            arguments: Further arguments of the command.
            environment: Additional environment variables of the ranks.
            during_hold: Function to call while the ranks wait before the step `hold_at`.
            record_options: See `record_batches`.
        """
        self.num_segments += 1
        records = self.folder / f"records_{self.num_segments}"
        records.mkdir()
        prepare = partial(record_batches, records, **record_options)
        arguments = (*self.overrides, *arguments)
        ranks = Ranks(
            self.config, *arguments, size=world_size, environment=environment, prepare=prepare
        )
        if during_hold is not None:
            while not (records / "holding").exists():
                assert any(process.is_alive() for process in ranks.processes), ranks.output()
                time.sleep(0.01)
            during_hold()
            (records / "continue").touch()
        statuses = ranks.wait()
        self.output = ranks.output()
        self._keep(records)
        return statuses

    def _keep(self, records: Path) -> None:
        lines = [
            json.loads(line)
            for path in records.iterdir()
            if path.name.isdecimal()
            for line in path.read_text().splitlines()
        ]
        steps: dict[int, list[str]] = {}
        for number, _, rows in sorted(lines):
            steps.setdefault(number, []).extend(rows)
        for number, rows in steps.items():
            if number in self.steps:
                assert rows == self.steps[number], f"step {number} has other views the second time"
                self.num_repeated += 1
        self.steps |= steps
