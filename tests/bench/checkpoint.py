"""Measure the time that a checkpoint adds to its step, saved synchronously or by a thread.

PYTHONPATH=. .venv/bin/python tests/bench/checkpoint.py [--backbone resnet50] [--folder DIR]

The method is BYOL with LARS, so a checkpoint holds student, teacher and momentum buffers. Measured
in turn: a step alone, a step that ends in a copy of that state to host memory, one that ends in a
synchronous save, and one that ends in an asynchronous save. The last two are the step after that,
which shares the processor with the writing thread, and the wait until the checkpoint is on disk,
which delays a step only if the next save is due.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from measure import HALFWAY, build_stepper_halfway, format_mib, time_interleaved, versions

from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints, RunFacts
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.methods import byol
from ssl_pretrain.models.backbones import build
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.views.batch import Batch

SYNC, ASYNC = (
    CheckpointConfig(asynchronous=False, keep_last=1),
    CheckpointConfig(asynchronous=True, keep_last=1),
)


class BenchmarkRun:
    """A training run that steps, copies and saves on demand."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        torch.manual_seed(0)
        method = byol.Config().build(build(BackboneConfig(name=options.backbone), options.size))
        settings = ParallelConfig()
        labels = torch.zeros(options.images, dtype=torch.int64, device=device)
        views = [
            torch.randn(options.images, 3, options.size, options.size, device=device)
            for _ in range(2)
        ]
        views = Execution.resolve(settings, device).place_views(views)
        self.batch = Batch(views, labels, labels)
        self.stepper = build_stepper_halfway(
            method,
            settings,
            OptimConfig(name="lars"),
            device,
            self.batch,
            micro_batch_size=options.images,
            global_batch_size=options.images,
        )
        self.folder, self.num_steps = Path(tempfile.mkdtemp(dir=options.folder)), 0
        state, facts = (
            TrainingState(method, self.stepper.optimizer),
            RunFacts(100, options.images, ""),
        )
        self.checkpoints = Checkpoints(self.folder, state, CheckpointConfig(), facts, {}, 100)

    def step(self) -> None:
        self.stepper(HALFWAY, self.batch)
        self.num_steps += 1

    def step_and_copy(self) -> None:
        self.step()
        self.checkpoints.state.snapshot()

    def step_and_save(self, settings: CheckpointConfig) -> None:
        self.step()
        self.checkpoints.settings = settings
        self.checkpoints.save(self.num_steps, wait=False)

    def finish_writing(self) -> None:
        self.checkpoints.wait_for_disk()

    def checkpoint_bytes(self) -> int:
        return sum(file.stat().st_size for file in newest_checkpoint(self.folder).iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="folder on the disk to measure")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = BenchmarkRun(options, device)
    candidates = {
        "a step": run.step,
        "a step and the copy to host memory": run.step_and_copy,
        "a step and a synchronous save": lambda: run.step_and_save(SYNC),
        "a step and an asynchronous save": lambda: run.step_and_save(ASYNC),
        "the next step, while the thread writes": run.step,
        "waiting until the checkpoint is on disk": run.finish_writing,
    }
    for candidate in candidates.values():
        candidate()
    seconds = time_interleaved(candidates, options.repeats, device)
    print(versions("timm", "safetensors"))
    print(
        f"BYOL, {options.backbone} at {options.size} pixels, {options.images} images, LARS; a "
        f"checkpoint of {format_mib(run.checkpoint_bytes())}; median of {options.repeats}, "
        "interleaved"
    )
    for name, value in seconds.items():
        print(f"{name:42s} {value:8.3f} s")
    step, *longer_steps, next_step, _ = seconds.values()
    copy_added, sync_added, async_added = (longer_step - step for longer_step in longer_steps)
    print(
        f"added: copy {copy_added:.3f} s, synchronous {sync_added:.3f} s, "
        f"asynchronous {async_added:.3f} s"
    )
    ratios = {
        "sync_added_over_step": sync_added / step,
        "async_added_over_step": async_added / step,
        "copy_added_over_step": copy_added / step,
        "next_step_over_step": next_step / step,
        "async_added_over_sync_added": async_added / max(sync_added, 1e-9),
    }
    print("ratios:", *(f"{name}={ratio:.3f}" for name, ratio in ratios.items()))
    shutil.rmtree(run.folder)


if __name__ == "__main__":
    main()
