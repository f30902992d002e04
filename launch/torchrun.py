"""Run torchrun on this machine, with clean stops and the exit status of the ranks.

Plain torchrun answers a signal with a traceback and status 1, kills ranks that need more than 30
seconds for their last checkpoint, and restarts ranks that stopped on request. This command does
none of that and takes torchrun's arguments:

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

from ssl_pretrain.system.exit_status import DISK_ERROR, STOPPED, USER_ERROR
from ssl_pretrain.system.stop_signals import STOP_SIGNALS

FINAL_STATUSES = (STOPPED, USER_ERROR, DISK_ERROR)  # statuses that a restart cannot change


class Supervisor:
    """Forward signals to torchrun's ranks and prevent useless restarts."""

    def __init__(self) -> None:
        self.rank_pids: list[int] = []
        self.stop_requested = False
        self.num_unsent_signals = 0
        self.exit_statuses: list[int] = []  # exit statuses of the ranks at the last failure

    def receive(self, signal_number: int, frame: Any) -> None:
        """Handle a stop signal."""
        self.stop_requested = True
        self.num_unsent_signals += 1
        if self.rank_pids:
            self.forward()

    def forward(self) -> None:
        """Send each rank one SIGTERM per signal received.

        After the first one the ranks save a checkpoint and exit. A second one ends them at once.
        """
        while self.num_unsent_signals:
            self.num_unsent_signals -= 1
            for pid in self.rank_pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def install(self) -> None:
        """Handle stop signals in this process, and extend torchrun's regular check of the ranks."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        for signal_number in STOP_SIGNALS:
            if signal.getsignal(signal_number) != signal.SIG_IGN:
                signal.signal(signal_number, self.receive)
        monitor_workers = LocalElasticAgent._monitor_workers

        def monitor(agent: Any, worker_group: Any) -> RunResult:
            self.rank_pids = [worker.id for worker in worker_group.workers]
            self.forward()
            result = monitor_workers(agent, worker_group)
            if result.is_failed():
                self.rank_pids = []
                self.exit_statuses = [failure.exitcode for failure in result.failures.values()]
                if self.stop_requested or not {*FINAL_STATUSES}.isdisjoint(self.exit_statuses):
                    agent._remaining_restarts = 0
            return result

        LocalElasticAgent._monitor_workers = monitor  # type: ignore[method-assign]

    def exit_status(self) -> int:
        """Return a single exit status for ranks that failed.

        A final status has priority over that of any other rank that was not killed. If all ranks
        were killed, they had no time to handle a stop request. The status is then 75 if a stop was
        requested, else 1.
        """
        final_statuses = [status for status in FINAL_STATUSES if status in self.exit_statuses]
        failures = [status for status in self.exit_statuses if status > 0]
        return [*final_statuses, *failures, STOPPED if self.stop_requested else 1][0]


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit status."""
    supervisor = Supervisor()
    supervisor.install()
    # torchrun's report of failed ranks repeats their own messages.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # Newer versions of torchrun read the signals to handle from an option.
    has_option = "--signals-to-handle" in run.get_args_parser()._option_string_actions
    signals = ["--signals-to-handle", "SIGQUIT"] if has_option else []
    try:
        run.run(run.parse_args([*signals, *arguments]))
    except ChildFailedError:
        return supervisor.exit_status()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
