"""Choose the image that replaces an unreadable one, the same in every run.

It is never an image of the same batch.

Each slot of a global batch owns a few of the images outside the batch, its spares. An unreadable
image takes the first readable spare of its own slot. If there is none, it looks through the slots
that follow, and leaves to each unreadable image on the way the spare that this one needs, as in the
matching of brackets. So the ranks and workers that make one batch never take the same spare,
although they exchange nothing. Usually one image is read to find it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.order import Plan


class Replacement(NamedTuple):
    """An unreadable image and the image that is shown in its place.

    Attributes:
        number: Number of the image that is shown.
        file: Name of the unreadable image.
        message: Why it cannot be read, and which image is shown.
    """

    number: int
    file: str
    message: str

    @classmethod
    def create(
        cls, source: Source, unreadable: int, reason: str, number: int | None
    ) -> Replacement:
        """Record that an image is shown in place of an unreadable one.

        Args:
            source: The images.
            unreadable: Number of the unreadable image.
            reason: Why it cannot be read.
            number: Number of the image that is shown, None if none is left.

        Raises:
            ValueError: No image is left.
        """
        if number is None:
            raise ValueError(
                f"data.root: {reason}; no other readable image of the {len(source):,} in "
                f"{source.where} is left outside its batch to take its place; repair or remove "
                "the unreadable images, or give a smaller global_batch_size"
            )
        message = f"{reason}; {source.name(number)} takes its place"
        return cls(number, source.name(unreadable), message)


def find_spare(plan: Plan, step: int, row: int, try_read: Callable[[int], bool]) -> int | None:
    """Choose an image to replace the unreadable one in a row of this rank's batch.

    Args:
        plan: The order of the run on this rank.
        step: The step whose batch has the unreadable image.
        row: Its row in this rank's batch.
        try_read: Reads an image and returns True if that succeeds. If a number is returned, the
            last call was for that image and gave True.

    Returns:
        Number of an image outside the global batch, or None if no readable one is left for the row.
    """
    order, start = plan.order(step)
    num_images, batch_size = len(order), plan.global_batch_size
    num_spares = num_images - batch_size
    first_slot = plan.rank * (batch_size // plan.world_size) + row
    unmatched = 1  # unreadable images that still need a spare, this row's image at the bottom
    for offset in range(batch_size):
        slot = (first_slot + offset) % batch_size
        if offset and not try_read(int(order[start + slot])):
            unmatched += 1
        for spare in range(slot * num_spares // batch_size, (slot + 1) * num_spares // batch_size):
            candidate = int(order[(start + batch_size + spare) % num_images])
            if try_read(candidate):
                unmatched -= 1
                if unmatched == 0:
                    return candidate
    return None
