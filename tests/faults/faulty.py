"""Train with planted faults: `FAULT=kind@rank:step[:argument] python faulty.py CONFIG ...`.

Several faults are separated by commas. The package itself contains no faults: this script wraps its
functions. A fault happens once in the life of a run's folder (FAULT_DONE marks it), so the resumed
run is free of faults. Steps are counted from 1, as in metrics.jsonl.

In a step:
    kill, stop     The rank sends itself SIGKILL or SIGSTOP.
    hang           The rank sleeps forever.
    raise          The rank raises an unexpected error.
    oom            The rank's GPU runs out of memory.
    nan            The rank's images are not numbers.
    inf            A gradient of the rank is infinite.
    flip           A weight of the rank changes.
    clock          The rank's wall clock goes back a day.
    slow           From that step on, each batch of the rank is a quarter of a second late.
In a save (step 0 means any save):
    writing        Print "writing" and take ARGUMENT seconds longer.
    kill_writing   Kill the rank when the file ARGUMENT is half written, before `rename`, or after
                   it, before `prune`.
    refuse         The disk answers with the error ARGUMENT, such as EIO.
Elsewhere:
    knn            The rank's online k-NN fails.
    differ         The rank's initial weights differ.
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

from ssl_pretrain import build as build_module
from ssl_pretrain import step, train
from ssl_pretrain.data import throughput_check
from ssl_pretrain.distributed import process_group
from ssl_pretrain.monitoring import online_knn


class Fault:
    """One fault, described by the text of FAULT. `plant` wraps the functions it needs.

    Args:
        text: kind@rank:step[:argument].
        done: File that marks a fault that has happened.
    """

    def __init__(self, text: str, done: Path):
        self.kind, _, place = text.partition("@")
        rank, at, *argument = place.split(":", 2)
        self.rank, self.at, self.argument, self.done = int(rank), int(at), "".join(argument), done

    def is_pending(self) -> bool:
        """Return True on the fault's rank until the fault has happened."""
        return process_group.rank() == self.rank and not self.done.exists()

    def begin(self, number: int) -> bool:
        """Mark the fault as done and return True if it happens in this step."""
        if not self.is_pending() or number != self.at:
            return False
        self.done.write_text("")
        return True

    def plant(self) -> None:
        getattr(self, f"plant_{self.kind}", self.plant_in_step)()

    def plant_none(self) -> None:
        pass

    def plant_in_step(self) -> None:
        act = getattr(self, f"act_{self.kind}")
        take_step = step.Stepper.__call__

        def faulty(stepper, progress, batch):
            changed = act(stepper, batch) if self.begin(progress.step + 1) else None
            return take_step(stepper, progress, batch if changed is None else changed)

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
            "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is "
            "large try"
        )

    def act_clock(self, stepper, batch):
        true_time = time.time
        time.time = lambda: true_time() - 86400

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
        watch = throughput_check.report_bottleneck

        def watched(loader, first_step, device):
            for number, batch in enumerate(watch(loader, first_step, device), start=first_step + 1):
                if process_group.rank() == self.rank and number >= self.at:
                    time.sleep(0.25)
                yield batch

        throughput_check.report_bottleneck = watched

    def plant_knn(self) -> None:
        embed = online_knn.OnlineKNN._embed

        def features(monitor, *arguments):
            if self.is_pending():
                self.done.write_text("")
                raise RuntimeError("planted in k-NN")
            return embed(monitor, *arguments)

        online_knn.OnlineKNN._embed = features

    def plant_differ(self) -> None:
        build_method = build_module.build_method

        def differing(*arguments, **named):
            method = build_method(*arguments, **named)
            with torch.no_grad():
                for parameter in method.parameters():
                    parameter.add_(0.1 * (process_group.rank() == self.rank))
            return method

        build_module.build_method = differing

    def _in_this_save(self, path: str) -> bool:
        return ("step_" if self.at == 0 else f"step_{self.at:08d}") in path and self.is_pending()

    def _before_each_fsync(self, act) -> None:
        """Call `act(path)` before a file of that save is fsynced."""
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

        self._before_each_fsync(wait)

    def plant_refuse(self) -> None:
        def refuse(path):
            self.done.write_text("")
            number = getattr(errno, self.argument)
            raise OSError(number, os.strerror(number))

        self._before_each_fsync(refuse)

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
            self._before_each_fsync(half_written)


def main(arguments: list[str], fault: str = "", done: str = "") -> int:
    for text in (fault or "none@0:0").split(","):
        Fault(text, Path(done)).plant()
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("FAULT", ""), os.environ.get("FAULT_DONE", "")))
