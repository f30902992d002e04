"""torchrun on this machine, which stops when asked and ends with the status of its ranks.

torchrun itself answers a signal with a traceback and status 1, kills ranks that need more than 30
seconds for their last save, and starts ranks again that ended on request. Its arguments are the
same: python -m ssl_pretrain.launch.torchrun --standalone --nproc-per-node 8 -m ssl_pretrain.train CONFIG
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ssl_pretrain.system.exit_status import DISK_REFUSED, MISTAKE, STOPPED
from ssl_pretrain.system.stop_signals import STOP_SIGNALS

# Exit statuses that would only come again: asked to stop, a mistake, the disk refused a checkpoint.
FINAL = (STOPPED, MISTAKE, DISK_REFUSED)


class Agent:
    """What this process adds to torchrun's agent: signals for the ranks, and no useless restart."""

    def __init__(self) -> None:
        self.ranks: list[int] = []  # process ids
        self.asked_to_stop = False
        self.signals = 0  # received and not forwarded yet
        self.statuses: list[int] = []  # of the ranks that failed last

    def receive(self, number: int, frame: Any) -> None:
        self.asked_to_stop = True
        self.signals += 1
        if self.ranks:
            self.forward()

    def forward(self) -> None:
        """Send each rank one SIGTERM per signal received: they save, and the second ends them at once."""
        while self.signals:
            self.signals -= 1
            for rank in self.ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGTERM)

    def install(self) -> None:
        """Handle the signals here, and look at the ranks whenever torchrun does."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)
        look = LocalElasticAgent._monitor_workers

        def monitor(agent: Any, worker_group: Any) -> RunResult:
            self.ranks = [worker.id for worker in worker_group.workers]
            self.forward()
            result = look(agent, worker_group)
            if result.is_failed():
                self.ranks = []
                self.statuses = [failure.exitcode for failure in result.failures.values()]
                if self.asked_to_stop or any(status in FINAL for status in self.statuses):
                    agent._remaining_restarts = 0
            return result

        LocalElasticAgent._monitor_workers = monitor  # type: ignore[method-assign]

    def status(self) -> int:
        """Exit status of ranks that failed: the one they agree on rather than that of a rank that was killed."""
        own = [status for status in self.statuses if status > 0]
        killed = STOPPED if self.asked_to_stop else 1  # before they could heed a request
        return next((status for status in FINAL if status in own), own[0] if own else killed)


def main(arguments: Sequence[str]) -> int:
    agent = Agent()
    agent.install()
    # torchrun's report of ranks that failed repeats what they have said themselves
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(_with_handled(arguments)))
    except ChildFailedError:
        return agent.status()
    return 0


def _with_handled(arguments: Sequence[str]) -> list[str]:
    """Arguments that leave SIGTERM and its like to this process, where torchrun has an option for it."""
    options = run.get_args_parser()._option_string_actions
    return [
        *(["--signals-to-handle", "SIGQUIT"] if "--signals-to-handle" in options else []),
        *arguments,
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
