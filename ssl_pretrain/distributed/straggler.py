"""The rank that the others wait for."""

import time

from ssl_pretrain.distributed import collectives, process_group


def measure_straggler(step: int, every_steps: int) -> dict[str, float]:
    """Find the slowest rank between steps, and how long the others wait for it.

    Between steps a rank spends its time on images, CPU work and logging. Within a step all ranks
    wait for each other in every collective. The measurement takes place every `every_steps` steps,
    on the CPU group.
    """
    if process_group.world_size() == 1 or step % every_steps:
        return {}
    start = time.monotonic()
    collectives.barrier()
    waits = collectives.gather_objects(time.monotonic() - start)
    return {"straggler": waits.index(min(waits)), "straggler_seconds": max(waits) - min(waits)}
