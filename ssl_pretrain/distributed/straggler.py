"""Measure which rank is the slowest between steps, and report a rank that stays the slowest."""

import socket
import sys
import time
from dataclasses import dataclass, field

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system.watchdog import watchdog

MIN_SHARE = 0.2  # share of a step that the others must wait for a rank before it is reported
NUM_IN_A_ROW = 5  # measurements with the same slowest rank before it is reported


@dataclass
class StragglerMonitor:
    """Monitor of the time that all ranks wait for the slowest one between steps.

    Between steps a rank spends its time on images, CPU work and logging. Within a step all ranks
    wait for each other in every collective.

    Args:
        every_steps: Number of steps between measurements, which take place on the CPU group.
    """

    every_steps: int
    _rank: int = -1
    _num_in_a_row: int = 0
    _reported_ranks: set[int] = field(default_factory=set)
    _previous_time: float = field(default_factory=time.monotonic)

    def measure(self, step: int) -> dict[str, float]:
        """Return the slowest rank and the seconds that the others waited for it.

        Rank 0 prints one line about a rank that is the slowest in `NUM_IN_A_ROW` measurements in a
        row and keeps the others waiting for more than `MIN_SHARE` of a step.
        """
        if process_group.world_size() == 1 or step % self.every_steps:
            return {}
        start = time.monotonic()
        collectives.barrier()
        end = time.monotonic()
        measurement = end - start, socket.gethostname(), watchdog.take_seconds_by_activity()
        waits, hosts, activities = zip(*collectives.gather_objects(measurement))
        rank = waits.index(min(waits))  # the slowest rank waits the shortest time
        wait_seconds = max(waits) - min(waits)
        step_seconds = (end - self._previous_time) / self.every_steps
        self._previous_time = end
        is_long = wait_seconds > MIN_SHARE * step_seconds
        self._num_in_a_row = self._num_in_a_row + 1 if is_long and rank == self._rank else is_long
        self._rank = rank
        if self._num_in_a_row == NUM_IN_A_ROW and rank not in self._reported_ranks:
            self._reported_ranks.add(rank)
            wait_share = wait_seconds / step_seconds
            text = describe_straggler(rank, hosts[rank], wait_share, list(activities))
            process_group.print_once(text, file=sys.stderr)
        return {"straggler": rank, "straggler_seconds": wait_seconds}


def describe_straggler(
    rank: int, host: str, share: float, activities: list[dict[str, float]]
) -> str:
    """Return a line that names a slow rank and the activity in which it loses its time.

    Args:
        rank: The slow rank.
        host: Its machine.
        share: Time that the others waited for it, as a share of a step.
        activities: For each rank, the seconds that it spent in each activity.
    """
    others = [seconds for other, seconds in enumerate(activities) if other != rank]

    def excess_seconds(activity: str) -> float:
        mean = sum(seconds.get(activity, 0.0) for seconds in others) / len(others)
        return activities[rank][activity] - mean

    slowest = max(activities[rank], key=excess_seconds)
    return (
        f"rank {rank} on {host} is slow: in {NUM_IN_A_ROW} measurements in a row the others waited "
        f"for it, last for {share:.0%} of a step. It loses the time in {slowest!r}. metrics.jsonl "
        "has the waiting times under straggler_seconds"
    )
