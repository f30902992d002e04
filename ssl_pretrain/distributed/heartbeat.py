"""Name the ranks that have not arrived when a collective operation hangs.

A thread of every rank publishes what the rank is doing in the store of the process group. It counts
the collectives that the rank has begun, with PyTorch's own counters, so the collectives of DDP and
FSDP are included. A rank that waits for more than `BEATS_BEFORE_READING` beats reads the entries of
the other ranks. The message that ends the run then names the ranks that have begun fewer
collectives than the others, with host and last operation.
"""

import atexit
import json
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from ssl_pretrain.system.import_path import PACKAGE
from ssl_pretrain.system.watchdog import watchdog

BEATS_PER_TIMEOUT = 20
BEATS_BEFORE_READING = 10  # by then all ranks have published where they wait
MAX_INTERVAL_SECONDS = 10.0
MAX_NAMED_RANKS = 4


@dataclass(frozen=True)
class Beat:
    """The state of one rank.

    Attributes:
        rank: The rank.
        host: Name of its machine.
        activity: What the watchdog waits for, such as "training step 5".
        operation: Innermost Python function of the training thread.
        num_collectives: Collective operations that the rank has begun, over all groups.
    """

    rank: int
    host: str
    activity: str
    operation: str
    num_collectives: int

    @property
    def progress(self) -> tuple[str, int]:
        """Values that only change while the rank makes progress.

        The operation is left out, because it also changes in a loop that waits.
        """
        return self.activity, self.num_collectives


class Heartbeat:
    """Thread that publishes this rank's state, and reads the other ranks' while this rank waits.

    Args:
        store: Store of the process group. A copy with a connection of its own is used, so that a
            store that does not answer only blocks this thread.
        rank: This rank.
        num_ranks: Number of ranks.
        timeout_seconds: Time after which a collective ends the run.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int, timeout_seconds: float) -> None:
        self._store = dist.PrefixStore("heartbeat", store.clone())
        self._rank, self._num_ranks = rank, num_ranks
        self._interval = min(timeout_seconds / BEATS_PER_TIMEOUT, MAX_INTERVAL_SECONDS)
        self._answer_seconds = max(1.0, self._interval / 2)  # time limit of a request to the store
        self._store.set_timeout(timedelta(seconds=self._answer_seconds))
        self._timeout_seconds, self._training_thread = timeout_seconds, threading.get_ident()
        self._description, self._is_closed = "", threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        # A thread that is inside the store's C++ code when Python exits would abort the process.
        atexit.register(self.close)

    def describe_missing_ranks(self) -> str:
        """Return a clause that names the ranks that have not arrived, or "" if none is known.

        They are known once this rank has waited for more than `BEATS_BEFORE_READING` beats.
        """
        return self._description

    def close(self) -> None:
        """End the thread. The last description stays available."""
        atexit.unregister(self.close)
        self._is_closed.set()
        self._thread.join(2 * self._answer_seconds)

    def _run(self) -> None:
        published, num_unchanged = None, 0
        while not self._is_closed.is_set():
            beat = self._observe()
            is_waiting = published is not None and beat.progress == published.progress
            num_unchanged = num_unchanged + 1 if is_waiting else 0
            try:
                if beat != published:
                    self._store.set(str(self._rank), json.dumps(asdict(beat)))
                    published = beat
                waits_long = num_unchanged > BEATS_BEFORE_READING
                self._description = format_missing_ranks(self._read_beats()) if waits_long else ""
            except RuntimeError:
                # Rank 0 serves the store and may end first. The last description stays valid.
                if not self._description and not self._is_closed.is_set():
                    self._description = (
                        "the store of the ranks, on rank 0's machine, does not answer"
                    )
            self._is_closed.wait(self._interval)

    def _observe(self) -> Beat:
        frame = sys._current_frames().get(self._training_thread)
        return Beat(
            self._rank,
            socket.gethostname(),
            watchdog.activity,
            _describe_stack(frame),
            _count_collectives(),
        )

    def _read_beats(self) -> list[Beat]:
        keys = [str(rank) for rank in range(self._num_ranks)]
        return [Beat(**json.loads(value)) for value in self._store.multi_get(keys)]


def format_missing_ranks(beats: list[Beat]) -> str:
    """Return a clause that names the ranks that have begun fewer collectives than another one."""
    num_begun = max(beat.num_collectives for beat in beats)
    missing = [beat for beat in beats if beat.num_collectives < num_begun]
    if not missing:
        return (
            f"all ranks have begun collective operation {num_begun}, so a device or a connection "
            "between them does not answer"
        )
    texts = [
        f"rank {beat.rank} on {beat.host} has not arrived at collective operation {num_begun}; it "
        f"has begun {beat.num_collectives} and was last in {beat.operation} while {beat.activity}"
        for beat in missing[:MAX_NAMED_RANKS]
    ]
    if len(missing) > MAX_NAMED_RANKS:
        texts.append(f"{len(missing) - MAX_NAMED_RANKS} more ranks have not arrived")
    return "; ".join(texts)


def _count_collectives() -> int:
    """Return the number of collectives that this rank has begun, over all of its groups."""
    num_begun = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        with suppress(RuntimeError):  # a backend without a counter, or a group that was destroyed
            num_begun += group._get_sequence_number_for_group()
    return num_begun


def _describe_stack(frame: FrameType | None) -> str:
    """Return the innermost function of a stack, and the innermost one of this package."""
    functions: list[str] = []
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        is_in_package = path.startswith(f"{PACKAGE}/")
        if not functions or is_in_package:
            functions.append(f"{name} ({path.rpartition('/')[2]}:{frame.f_lineno})")
        if is_in_package:
            break
        frame = frame.f_back
    return ", called by ".join(functions) or "an unknown function"
