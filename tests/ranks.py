"""The ranks of a run as processes of this machine, started in under a second: forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from ssl_pretrain.checkpoint import state as checkpoint


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


class Ranks:
    """`python -m ssl_pretrain.train CONFIG ARGUMENTS` on `size` ranks, without an agent that would end the others.

    Args:
        path: the YAML; the ranks' output and what marks a fault as done lie beside it.
        fault: planted by tests/faults/faulty.py, which says how it is written; empty for none.
        environment: more of it, for all ranks.
    """

    def __init__(
        self,
        path: Path,
        *arguments: str,
        size: int = 3,
        fault: str = "",
        environment: dict[str, str] | None = None,
    ):
        self.log = path.parent / f"said_{time.monotonic_ns()}"
        self.log.mkdir()
        done = str(path.parent / "fault_done")
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.processes = [
            multiprocessing.get_context(
                "forkserver"
            ).Process(  # tests/conftest.py has told it what to import
                target=_rank,
                args=(
                    rank,
                    size,
                    {**meeting, **(environment or {})},
                    self.log / str(rank),
                    [str(path), *arguments],
                    fault,
                    done,
                ),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def said(self, rank: int | None = None) -> str:
        chosen = range(len(self.processes)) if rank is None else [rank]
        return "".join(
            (self.log / str(one)).read_text() for one in chosen if (self.log / str(one)).exists()
        )

    def until(self, text: str, seconds: float = 600) -> None:
        """Waits until some rank has said it."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < end and any(
                process.is_alive() for process in self.processes
            ), f"{text!r} not in:\n{self.said()}"
            time.sleep(0.02)

    def until_step(self, run: Path, step: int, seconds: float = 600) -> None:
        """Waits until the run has logged so many steps; the console leaves some out."""
        end, records = time.monotonic() + seconds, run / "metrics.jsonl"
        while not records.exists() or records.read_text().count("\n") < step:
            assert time.monotonic() < end and any(
                process.is_alive() for process in self.processes
            ), self.said()
            time.sleep(0.02)

    def send(self, number: int, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def end(self, seconds: float = 600) -> list[int]:
        """The exit status of each rank; negative: the signal that ended it."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, until - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join(10)
        assert not alive, f"ranks {alive} were alive after {seconds} s:\n{self.said()[-3000:]}"
        return [process.exitcode for process in self.processes]


def _rank(rank, size, environment, log, arguments, fault, done):
    os.setsid()  # as torchrun starts them
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    names = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    os.environ.update((names if size > 1 else {}) | environment)
    if fault:
        sys.path.insert(0, str(Path(__file__).parent / "faults"))
        import faulty

        raise SystemExit(faulty.main(arguments, fault, done))
    from ssl_pretrain import train

    raise SystemExit(train.main(arguments))


def weights(run: Path) -> dict:
    """What the newest checkpoint holds: the method's tensors and the optimizer's."""
    path = checkpoint.newest(run)
    return checkpoint.read(path)[1] | load_file(path / "optimizer.safetensors")


def run(path: Path, *arguments: str, **named) -> tuple[list[int], str]:
    """(exit statuses, what all ranks said) of a run to its end."""
    ranks = Ranks(path, *arguments, **named)
    return ranks.end(), ranks.said()
