"""The rank that the others wait for."""

from __future__ import annotations

import time

from ssl_pretrain.distributed import collectives, process_group


def measure_straggler(step: int, every_steps: int) -> dict[str, float]:
    """Find the slowest rank between steps, and how long the others wait for it, by their clocks.

    The time between steps is that of a rank's images, processor and logging. Within a step all
    ranks wait for each other in every collective. Measured every `every_steps`, on the CPU group.
    """
    if process_group.world_size() == 1 or step % every_steps:
        return {}
    began = time.monotonic()
    collectives.barrier()
    waits = collectives.gather_objects(time.monotonic() - began)
    return {"straggler": waits.index(min(waits)), "straggler_seconds": max(waits) - min(waits)}
