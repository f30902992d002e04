"""Run the ranks of a training run as processes forked from one that has imported everything."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Ranks:
    """`python -m ssl_pretrain.train CONFIG ARGUMENTS` on several ranks, without torchrun's agent.

    An agent would end the other ranks when one of them ends.

    Args:
        path: The configuration. The outputs of the ranks and the marker of a fault go beside it.
        arguments: Further arguments of the command.
        size: Number of ranks.
        fault: Faults in the notation of tests/faults/faulty.py.
        environment: Additional environment variables of all ranks.
        prepare: Function that every rank calls before it trains. It must be picklable.
    """

    def __init__(
        self,
        path: Path,
        *arguments: str,
        size: int = 3,
        fault: str = "",
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        self.log = path.parent / f"output_{time.monotonic_ns()}"
        self.log.mkdir()
        marker = str(path.parent / "fault_done")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        variables = {**address, **(environment or {})}
        command = [str(path), *arguments]
        context = multiprocessing.get_context("forkserver")  # preloaded by tests/fork_server.py
        self.processes = []
        for rank in range(size):
            options = (rank, size, variables, self.log / str(rank), command, fault, marker, prepare)
            self.processes.append(context.Process(target=_run_rank, args=options))
        for process in self.processes:
            process.start()

    def output(self, rank: int | None = None) -> str:
        """Return the output of one rank or of all ranks so far."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        files = [self.log / str(rank) for rank in ranks]
        return "".join(file.read_text() for file in files if file.exists())

    def wait_for_text(self, text: str, seconds: float = 600) -> None:
        """Wait until some rank has printed the text."""
        deadline = time.monotonic() + seconds
        while text not in self.output():
            assert self._may_continue(deadline), f"{text!r} not in:\n{self.output()}"
            time.sleep(0.02)

    def wait_for_step(self, run: Path, step: int, seconds: float = 600) -> None:
        """Wait until metrics.jsonl has that many steps. The console does not print every step."""
        deadline, records = time.monotonic() + seconds, run / "metrics.jsonl"
        while not records.exists() or records.read_text().count("\n") < step:
            assert self._may_continue(deadline), self.output()
            time.sleep(0.02)

    def _may_continue(self, deadline: float) -> bool:
        return time.monotonic() < deadline and any(process.is_alive() for process in self.processes)

    def send(self, signal_number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all ranks that are alive."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, signal_number)

    def wait(self, seconds: float = 600) -> list[int]:
        """Wait until all ranks have exited and return their exit statuses.

        A negative status is the number of the signal that ended the rank.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(10)
        output = self.output()[-3000:]
        assert not alive, f"ranks {alive} were still running after {seconds} s:\n{output}"
        return [process.exitcode for process in self.processes]


def _run_rank(rank, size, environment, log, arguments, fault, marker, prepare):
    os.setsid()  # torchrun starts each rank in a session of its own, too
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= environment
    if fault:
        sys.path.insert(0, str(Path(__file__).parent / "faults"))
        import faulty

        raise SystemExit(faulty.main(arguments, fault, marker))
    from ssl_pretrain import train

    if prepare is not None:
        prepare()
    raise SystemExit(train.main(arguments))


def load_tensors(run: Path) -> dict:
    """Return the tensors of the method and the optimizer in the newest checkpoint."""
    path = newest_checkpoint(run)
    return read_checkpoint(path)[1] | load_file(path / "optimizer.safetensors")


def run(path: Path, *arguments: str, **options) -> tuple[list[int], str]:
    """Run all ranks until they exit, and return their exit statuses and outputs."""
    ranks = Ranks(path, *arguments, **options)
    return ranks.wait(), ranks.output()
