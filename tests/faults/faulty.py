"""A run with one fault planted: FAULT=kind@rank:step python tests/faults/faulty.py CONFIG [key=value ...], under torchrun or alone.

kill, stop: the rank sends itself SIGKILL or SIGSTOP at that step. hang: it sleeps in a loop. slow: every step from there takes a
quarter of a second longer. differ: its weights at the start are not those of the others. raise: an error that nobody expects.
Once in the life of a run's folder, so that the resumed run is whole.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from ssl_pretrain import distributed, step, train


def main() -> int:
    kind, _, place = os.environ["FAULT"].partition("@")
    rank, at = (int(number) for number in place.split(":"))
    done = Path(os.environ["FAULT_DONE"])
    real = step.Stepper.__call__

    def faulty(self, number, progress, batch):
        if distributed.rank() == rank and number + 1 >= at and not done.exists():
            if kind == "slow":
                time.sleep(0.25)
            elif number + 1 == at:
                done.write_text("")
                act()
        return real(self, number, progress, batch)

    def act():
        if kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        elif kind == "hang":
            while True:
                time.sleep(1)
        elif kind == "raise":
            raise RuntimeError("planted")

    step.Stepper.__call__ = faulty
    if kind == "differ":
        build = train.build_method

        def differing(*arguments, **named):
            method = build(*arguments, **named)
            with torch.no_grad():
                for parameter in method.parameters():
                    parameter.add_(0.1 * (distributed.rank() == rank))
            return method

        train.build_method = differing
    return train.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
