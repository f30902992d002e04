"""A run with a fault planted (several: separated by commas): FAULT=kind@rank:step[:argument] python tests/faults/faulty.py CONFIG [key=value ...], under torchrun or alone.

The package itself knows of no fault: this wraps its functions. A fault happens once in the life of a run's folder (FAULT_DONE), so
that the resumed run is whole. Steps are numbered from 1, as metrics.jsonl numbers them.

kill, stop: the rank sends itself SIGKILL or SIGSTOP in that step. hang: it sleeps in a loop. raise: an error that nobody expects.
oom: the GPU's memory ran out. nan: its images are not numbers. inf: a gradient is infinite. flip: a weight of it has changed.
slow: from that step on, a quarter of a second passes before each of its batches. knn: its k-NN fails. differ: its first weights are
others. clock: its wall clock goes back a day. writing: the save of that step (0: any) prints "writing" and takes ARGUMENT seconds longer.
kill_writing: it is killed in that save, after the file ARGUMENT was half written, before `rename`, or after it, before `prune`.
refuse: the disk answers that save with the error ARGUMENT, such as EIO.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ssl_pretrain import build as build_
from ssl_pretrain import step, train
from ssl_pretrain.data import preflight
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import online_knn


class Fault:
    """One fault, by the text of FAULT: `plant` wraps what it needs."""

    def __init__(self, text: str, done: Path):
        self.kind, _, place = text.partition("@")
        rank, at, *argument = place.split(":", 2)
        self.rank, self.at, self.argument, self.done = int(rank), int(at), "".join(argument), done

    def here(self) -> bool:
        return process_group.rank() == self.rank and not self.done.exists()

    def now(self, number: int) -> bool:
        """Whether it happens in this step; it will not again."""
        if not self.here() or number != self.at:
            return False
        self.done.write_text("")
        return True

    def plant(self) -> None:
        getattr(self, f"plant_{self.kind}", self.plant_in_a_step)()

    def plant_none(self) -> None:
        pass

    def plant_in_a_step(self) -> None:
        act = getattr(self, f"act_{self.kind}")
        real = step.Stepper.__call__

        def faulty(stepper, progress, batch):
            changed = act(stepper, batch) if self.now(progress.step + 1) else None
            return real(stepper, progress, batch if changed is None else changed)

        step.Stepper.__call__ = faulty

    def act_kill(self, stepper, batch):
        os.kill(os.getpid(), signal.SIGKILL)

    def act_stop(self, stepper, batch):
        os.kill(os.getpid(), signal.SIGSTOP)

    def act_hang(self, stepper, batch):
        while True:
            time.sleep(1)

    def act_raise(self, stepper, batch):
        raise RuntimeError("planted")

    def act_oom(self, stepper, batch):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try"
        )

    def act_clock(self, stepper, batch):
        real = time.time
        time.time = lambda: real() - 86400

    def act_nan(self, stepper, batch):
        return replace(batch, views=[torch.full_like(view, float("nan")) for view in batch.views])

    def act_inf(self, stepper, batch):
        parameter = next(
            parameter for parameter in stepper.model.parameters() if parameter.ndim > 1
        )
        handle = parameter.register_hook(
            lambda gradient: (handle.remove(), gradient * float("inf"))[1]
        )

    def act_flip(self, stepper, batch):
        with torch.no_grad():
            next(stepper.model.parameters()).flatten()[0] += 10

    def plant_slow(self) -> None:
        real = preflight.watched

        def watched(loader, first_step, device):
            for number, batch in enumerate(real(loader, first_step, device), start=first_step + 1):
                if process_group.rank() == self.rank and number >= self.at:
                    time.sleep(0.25)
                yield batch

        preflight.watched = watched

    def plant_knn(self) -> None:
        real = online_knn.OnlineKNN._embed

        def features(monitor, *arguments):
            if self.here():
                self.done.write_text("")
                raise RuntimeError("planted in k-NN")
            return real(monitor, *arguments)

        online_knn.OnlineKNN._embed = features

    def plant_differ(self) -> None:
        build = build_.build_method

        def differing(*arguments, **named):
            method = build(*arguments, **named)
            with torch.no_grad():
                for parameter in method.parameters():
                    parameter.add_(0.1 * (process_group.rank() == self.rank))
            return method

        build_.build_method = differing

    def _in_this_save(self, path: str) -> bool:
        return ("step_" if self.at == 0 else f"step_{self.at:08d}") in path and self.here()

    def _at_each_file(self, act) -> None:
        """`act(path, descriptor)` where a file of that save is about to be on disk."""
        fsync = os.fsync

        def faulty(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._in_this_save(path):
                act(path)
            return fsync(descriptor)

        os.fsync = faulty

    def plant_writing(self) -> None:
        def wait(path):
            self.done.write_text("")
            print("writing", flush=True)
            time.sleep(float(self.argument))

        self._at_each_file(wait)

    def plant_refuse(self) -> None:
        def refuse(path):
            self.done.write_text("")
            number = getattr(errno, self.argument)
            raise OSError(number, os.strerror(number))

        self._at_each_file(refuse)

    def plant_kill_writing(self) -> None:
        rename = os.rename

        def die():
            self.done.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

        def half_written(path):
            if path.endswith(self.argument):
                os.truncate(path, os.stat(path).st_size // 2)
                die()

        def at_rename(source, target):
            moved = self._in_this_save(str(target))
            if moved and self.argument == "rename":
                die()
            rename(source, target)
            if moved and self.argument == "prune":
                die()

        if self.argument in ("rename", "prune"):
            os.rename = at_rename
        else:
            self._at_each_file(half_written)


def main(arguments: list[str], fault: str = "", done: str = "") -> int:
    for text in (fault or "none@0:0").split(","):
        Fault(text, Path(done)).plant()
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("FAULT", ""), os.environ.get("FAULT_DONE", "")))
