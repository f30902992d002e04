"""Train with injected faults: `FAULT=kind@rank:step[:argument] python faulty.py CONFIG ...`.

Several faults are separated by commas. The package has no hooks for faults, so this script wraps
its functions. A fault happens once per run folder. The file FAULT_DONE marks that it has happened,
so a resumed run is free of faults. Steps are counted from 1, as in metrics.jsonl.

In a step:
    kill, stop     The rank sends itself SIGKILL or SIGSTOP.
    hang           The rank sleeps forever.
    raise          The rank raises an unexpected error.
    oom            The rank's GPU runs out of memory.
    nan            The rank's images are NaN.
    inf            A gradient of the rank is infinite.
    flip           A weight of the rank changes.
    clock          The rank's wall clock jumps back by a day.
    slow           From that step on, each batch of the rank arrives a quarter of a second late.
In a save (step 0 means any save):
    writing        Print "writing" and take ARGUMENT seconds longer.
    kill_writing   Kill the rank when the file ARGUMENT is half written. With the argument `rename`,
                   kill it just before the rename. With `prune`, kill it just after the rename.
    refuse         The write fails with the error ARGUMENT, such as EIO.
Elsewhere:
    knn            The rank's online k-NN fails.
    differ         The rank's initial weights differ.
"""

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
    """One fault. `inject` wraps the package's functions that are to fail.

    Args:
        text: kind@rank:step[:argument].
        marker: File that is written when the fault happens.
    """

    def __init__(self, text: str, marker: Path):
        self.kind, _, rest = text.partition("@")
        rank, step, *argument = rest.split(":", 2)
        self.rank, self.step, self.argument = int(rank), int(step), "".join(argument)
        self.marker = marker

    def is_pending(self) -> bool:
        """Return True on the fault's rank until the fault has happened."""
        return process_group.rank() == self.rank and not self.marker.exists()

    def mark_at_step(self, step: int) -> bool:
        """Write the marker and return True if the fault happens in this step."""
        if not self.is_pending() or step != self.step:
            return False
        self.marker.write_text("")
        return True

    def inject(self) -> None:
        getattr(self, f"inject_{self.kind}", self.inject_in_step)()

    def inject_none(self) -> None:
        pass

    def inject_in_step(self) -> None:
        act = getattr(self, f"act_{self.kind}")
        call = step.Stepper.__call__

        def call_with_fault(stepper, progress, batch):
            if self.mark_at_step(progress.step + 1):
                batch = act(stepper, batch) or batch
            return call(stepper, progress, batch)

        step.Stepper.__call__ = call_with_fault

    def act_kill(self, stepper, batch):
        os.kill(os.getpid(), signal.SIGKILL)

    def act_stop(self, stepper, batch):
        os.kill(os.getpid(), signal.SIGSTOP)

    def act_hang(self, stepper, batch):
        while True:
            time.sleep(1)

    def act_raise(self, stepper, batch):
        raise RuntimeError("injected")

    def act_oom(self, stepper, batch):
        message = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise torch.OutOfMemoryError(f"{message} If reserved but unallocated memory is large try")

    def act_clock(self, stepper, batch):
        true_time = time.time
        time.time = lambda: true_time() - 86400

    def act_nan(self, stepper, batch):
        return replace(batch, views=[torch.full_like(view, float("nan")) for view in batch.views])

    def act_inf(self, stepper, batch):
        matrix = next(p for p in stepper.model.parameters() if p.ndim > 1)

        def multiply_once(gradient):
            handle.remove()
            return gradient * float("inf")

        handle = matrix.register_hook(multiply_once)

    def act_flip(self, stepper, batch):
        with torch.no_grad():
            weight = next(stepper.model.parameters())
            weight[(0,) * weight.ndim] += 10

    def inject_slow(self) -> None:
        report = throughput_check.report_bottleneck

        def delay_batches(loader, first_step, device):
            for number, batch in enumerate(report(loader, first_step, device), first_step + 1):
                if process_group.rank() == self.rank and number >= self.step:
                    time.sleep(0.25)
                yield batch

        throughput_check.report_bottleneck = delay_batches

    def inject_knn(self) -> None:
        embed = online_knn.OnlineKNN._embed

        def embed_with_error(monitor, *arguments):
            if self.is_pending():
                self.marker.write_text("")
                raise RuntimeError("injected into k-NN")
            return embed(monitor, *arguments)

        online_knn.OnlineKNN._embed = embed_with_error

    def inject_differ(self) -> None:
        build_method = build_module.build_method

        def build_with_other_weights(*arguments, **options):
            method = build_method(*arguments, **options)
            with torch.no_grad():
                for parameter in method.parameters():
                    parameter.add_(0.1 * (process_group.rank() == self.rank))
            return method

        build_module.build_method = build_with_other_weights

    def _is_in_save(self, path: str) -> bool:
        name = "step_" if self.step == 0 else f"step_{self.step:08d}"
        return name in path and self.is_pending()

    def _call_before_fsync(self, act) -> None:
        """Call `act(path)` before each fsync of a file of the save."""
        fsync = os.fsync

        def act_and_fsync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if self._is_in_save(path):
                act(path)
            return fsync(descriptor)

        os.fsync = act_and_fsync

    def inject_writing(self) -> None:
        def wait(path):
            self.marker.write_text("")
            print("writing", flush=True)
            time.sleep(float(self.argument))

        self._call_before_fsync(wait)

    def inject_refuse(self) -> None:
        def refuse(path):
            self.marker.write_text("")
            code = getattr(errno, self.argument)
            raise OSError(code, os.strerror(code))

        self._call_before_fsync(refuse)

    def inject_kill_writing(self) -> None:
        rename = os.rename

        def die():
            self.marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

        def truncate_and_die(path):
            if path.endswith(self.argument):
                os.truncate(path, os.stat(path).st_size // 2)
                die()

        def rename_and_die(source, target):
            is_in_save = self._is_in_save(str(target))
            if is_in_save and self.argument == "rename":
                die()
            rename(source, target)
            if is_in_save and self.argument == "prune":
                die()

        if self.argument in ("rename", "prune"):
            os.rename = rename_and_die
        else:
            self._call_before_fsync(truncate_and_die)


def main(arguments: list[str], fault: str = "", marker: str = "") -> int:
    for text in (fault or "none@0:0").split(","):
        Fault(text, Path(marker)).inject()
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ.get("FAULT", ""), os.environ.get("FAULT_DONE", "")))
