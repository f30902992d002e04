"""torchrun on this machine, with clean stops: it exits with the status of its ranks.

torchrun itself answers a signal with a traceback and status 1, kills ranks that need more than 30
seconds for their last checkpoint, and restarts ranks that ended on request. The arguments are the
same:

    python -m ssl_pretrain.launch.torchrun --nproc-per-node 8 -m ssl_pretrain.train CONFIG
"""

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

from ssl_pretrain.system.exit_status import DISK_REFUSED, STOPPED, USER_ERROR
from ssl_pretrain.system.stop_signals import STOP_SIGNALS

FINAL = (STOPPED, USER_ERROR, DISK_REFUSED)  # exit statuses that a restart would only repeat


class Agent:
    """Additions to torchrun's agent: it forwards signals and omits useless restarts."""

    def __init__(self) -> None:
        self.ranks: list[int] = []  # process ids
        self.stop_requested = False
        self.num_unsent_signals = 0
        self.statuses: list[int] = []  # exit statuses at the last failure

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.stop_requested = True
        self.num_unsent_signals += 1
        if self.ranks:
            self.forward()

    def forward(self) -> None:
        """Send each rank one SIGTERM per signal received.

        The ranks save a checkpoint at the first, and the second ends them at once.
        """
        while self.num_unsent_signals:
            self.num_unsent_signals -= 1
            for rank in self.ranks:
                with suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGTERM)

    def install(self) -> None:
        """Handle the signals in this process, and look after the ranks whenever torchrun does."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)
        monitor_workers = LocalElasticAgent._monitor_workers

        def monitor(agent: Any, worker_group: Any) -> RunResult:
            self.ranks = [worker.id for worker in worker_group.workers]
            self.forward()
            result = monitor_workers(agent, worker_group)
            if result.is_failed():
                self.ranks = []
                self.statuses = [failure.exitcode for failure in result.failures.values()]
                if self.stop_requested or any(status in FINAL for status in self.statuses):
                    agent._remaining_restarts = 0
            return result

        LocalElasticAgent._monitor_workers = monitor  # type: ignore[method-assign]

    def status(self) -> int:
        """Return the exit status of ranks that failed.

        A final status comes first, then that of any rank that exited by itself. If all ranks were
        killed, the status is 75 after a stop request, which they had no time to handle, else 1.
        """
        exits = [status for status in self.statuses if status > 0]
        final = [status for status in FINAL if status in exits]
        return [*final, *exits, STOPPED if self.stop_requested else 1][0]


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit status."""
    agent = Agent()
    agent.install()
    # torchrun's report of failed ranks repeats their own messages.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # Newer versions of torchrun read the signals to handle from an option.
    has_option = "--signals-to-handle" in run.get_args_parser()._option_string_actions
    signals = ["--signals-to-handle", "SIGQUIT"] if has_option else []
    try:
        run.run(run.parse_args([*signals, *arguments]))
    except ChildFailedError:
        return agent.status()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
