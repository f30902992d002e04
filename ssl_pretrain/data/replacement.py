"""Choose the images that replace unreadable ones, and end the run if there are too many of them.

The choice is the same in every run, and never an image of the same batch.

Each slot of a global batch owns a few of the images outside the batch, its spares. An unreadable
image is replaced by the first readable spare of its own slot. If there is none, the following slots
are searched. Each unreadable image on the way needs a spare too, so spares are matched with
unreadable images like closing brackets with opening ones. Therefore the ranks and workers that make
a batch never choose the same spare, without any communication. Usually one read is enough.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.order import Plan
from ssl_pretrain.distributed import collectives

BETON_FACTOR = 0.1  # a .beton may lose fewer images, as all were readable when it was written


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
    def create(cls, source: Source, unreadable: int, reason: str, number: int | None) -> Self:
        """Record that an image is shown in place of an unreadable one.

        Args:
            source: The images.
            unreadable: Number of the unreadable image.
            reason: Why it cannot be read.
            number: Number of the image that is shown, None if none is left.

        Raises:
            ValueError: If no image is left.
        """
        if number is None:
            raise ValueError(
                f"data.root: {reason}; no other readable image of the {len(source):,} in "
                f"{source.where} is left outside its batch to take its place; repair or remove "
                "the unreadable images, or give a smaller global_batch_size"
            )
        return cls(
            number, source.name(unreadable), f"{reason}; {source.name(number)} takes its place"
        )


def find_spare(plan: Plan, step: int, row: int, try_read: Callable[[int], bool]) -> int | None:
    """Choose an image to replace the unreadable one in a row of this rank's batch.

    Args:
        plan: The order of the run on this rank.
        step: The step whose batch has the unreadable image.
        row: Its row in this rank's batch.
        try_read: Reads an image and returns True if that succeeds. The last call is for the image
            whose number is returned.

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


class ReplacementLimit:
    """Enforces `data.max_replaced` in each pass over the data, and warns about each file once.

    Attributes:
        total: Replaced images in all passes so far.
    """

    def __init__(self, source: Source, num_images: int, max_replaced: float):
        """Allow a share of the images of each pass, but at least one image if the share is not 0.

        Args:
            source: The images, for messages.
            num_images: Images per pass.
            max_replaced: The share, `data.max_replaced`.
        """
        self.total = 0
        self._source, self._num_images = source, num_images
        self._share = max_replaced * (BETON_FACTOR if isinstance(source, Beton) else 1.0)
        self._allowed = max(1, int(self._share * num_images)) if self._share > 0 else 0
        self._num_in_pass, self._num_reported = 0, 0
        self._files: set[str] = set()

    def begin_pass(self) -> None:
        """Reset the count that is compared with the limit."""
        self._num_in_pass = 0

    def add(self, replacements: Sequence[Replacement]) -> None:
        """Count replacements.

        Raises:
            ValueError: If there are too many in this pass.
        """
        for replacement in replacements:
            if replacement.file not in self._files:
                self._files.add(replacement.file)
                warnings.warn(replacement.message, stacklevel=5)
        self.total += len(replacements)
        self._num_in_pass += len(replacements)
        if replacements:
            self._check(self._num_in_pass, replacements[-1].message)

    def add_ranks(self, is_reported: bool) -> int:
        """Apply the limit to the sum of all ranks. A collective on the CPU.

        Args:
            is_reported: The result is reported, so the next report starts from 0.

        Returns:
            Images that all ranks have replaced since the last report.

        Raises:
            ValueError: If the ranks have replaced too many images in this pass.
        """
        counts = collectives.gather_objects((self._num_in_pass, self.total - self._num_reported))
        self._check(sum(num_in_pass for num_in_pass, _ in counts))
        if is_reported:
            self._num_reported = self.total
        return sum(num_unreported for _, num_unreported in counts)

    def _check(self, num_replaced: int, example: str = "") -> None:
        if num_replaced <= self._allowed:
            return
        remedy = "restore the files, remove them from the data set, or raise data.max_replaced"
        if isinstance(self._source, Beton):
            remedy = (
                "all of them could be read when the file was written, so it is damaged now; "
                "`python -m ssl_pretrain.data.beton check` names them; copy or write it again"
            )
        last = f"; the last: {example}" if example else ""
        raise ValueError(
            f"data.max_replaced: {num_replaced:,} of {self._num_images:,} images of "
            f"{self._source.where} could not be read in one pass, more than the {self._allowed:,} "
            f"that may be replaced ({self._share:.3g} of the images){last}; {remedy}"
        )
