"""Choose the image that replaces an unreadable one: the same in every run, and never one of the same batch.

Each slot of a global batch owns a few of the images outside the batch, its spares. An unreadable image takes the first
readable spare of its own slot. Where there is none, it looks through the slots that follow, and leaves to each
unreadable image on the way what that one needs, as in the matching of brackets. So the ranks and workers that make one
batch never take the same spare, although they exchange nothing, and usually two or three images are read to know.
"""

from __future__ import annotations

from collections.abc import Callable

from ssl_pretrain.data.order import Plan


def spare(plan: Plan, step: int, row: int, readable: Callable[[int], bool]) -> int | None:
    """Return the image that takes the place of the unreadable one in a row of this rank's batch.

    Args:
        plan: The order of the run on this rank.
        step: The step whose batch has the unreadable image.
        row: Its row in this rank's batch.
        readable: Tries to read an image. Where an image is returned, the last call was for it and gave True.

    Returns:
        The number of an image outside the global batch, or None if no readable one is left for this row.
    """
    order, start = plan.order(step)
    num_images, batch_size = len(order), plan.global_batch_size
    num_spares = num_images - batch_size
    own_slot = plan.rank * (batch_size // plan.world_size) + row
    unmatched = 1  # unreadable images that still need a spare, this row's image at the bottom
    for offset in range(batch_size):
        slot = (own_slot + offset) % batch_size
        if offset and not readable(int(order[start + slot])):
            unmatched += 1
        for number in range(slot * num_spares // batch_size, (slot + 1) * num_spares // batch_size):
            candidate = int(order[(start + batch_size + number) % num_images])
            if readable(candidate):
                unmatched -= 1
                if unmatched == 0:
                    return candidate
    return None
