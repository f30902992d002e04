"""Choose replacements for unreadable images, and end the run if too many images are unreadable.

The choice is the same in every run, and a replacement never comes from the same batch.

Each slot of a global batch owns a few of the images outside the batch, its spares. An unreadable
image is replaced by the first readable spare of its own slot. If there is none, the following slots
are searched. Each unreadable image on the way needs a spare too, so spares are matched with
unreadable images like closing brackets with opening ones. The ranks and workers that make a batch
therefore never choose the same spare, although they do not communicate. Usually one read is enough.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.distributed import collectives

# The limit is lower for a .beton, because all of its images were readable when it was written.
BETON_LIMIT_FACTOR = 0.1


class Replacement(NamedTuple):
    """An unreadable image and its replacement.

    Attributes:
        spare_index: Index of the replacement.
        unreadable_index: Index of the unreadable image.
        unreadable_name: Name of the unreadable image.
        read_error: Message that names the unreadable image and why it cannot be read.
        message: Warning that names the unreadable image, the reason and the replacement.
    """

    spare_index: int
    unreadable_index: int
    unreadable_name: str
    read_error: str
    message: str

    @classmethod
    def create(
        cls, source: Source, unreadable_index: int, read_error: str, spare_index: int | None
    ) -> Self:
        """Record the replacement of an unreadable image.

        Args:
            source: Source of both images.
            unreadable_index: Index of the unreadable image.
            read_error: Message that names the unreadable image and why it cannot be read.
            spare_index: Index of the replacement, or None if no image is left.

        Raises:
            ValueError: If no image is left.
        """
        if spare_index is None:
            raise ValueError(
                f"data.root: {read_error}; no other readable image of the {len(source):,} in "
                f"{source.full_path} is left outside its batch to take its place; repair or remove "
                "the unreadable images, or give a smaller global_batch_size"
            )
        message = f"{read_error}; {source.name(spare_index)} takes its place"
        name = source.name(unreadable_index)
        return cls(spare_index, unreadable_index, name, read_error, message)


def find_spare(plan: BatchPlan, step: int, row: int, try_read: Callable[[int], bool]) -> int | None:
    """Choose an image to replace the unreadable one in a row of this rank's batch.

    Args:
        plan: Batch plan of this rank.
        step: Step whose batch contains the unreadable image.
        row: Row of the unreadable image in this rank's batch.
        try_read: Function that reads an image and returns True if that succeeds. The last call
            reads the replacement.

    Returns:
        Index of an image outside the global batch, or None if no readable one is left for the row.
    """
    order, start = plan.order(step)
    num_images, batch_size = len(order), plan.global_batch_size
    num_spares = num_images - batch_size
    first_slot = plan.rank * (batch_size // plan.world_size) + row
    num_unmatched = 1  # unreadable images that need a spare, including the image of this row
    for offset in range(batch_size):
        slot = (first_slot + offset) % batch_size
        if offset and not try_read(int(order[start + slot])):
            num_unmatched += 1
        for spare in range(slot * num_spares // batch_size, (slot + 1) * num_spares // batch_size):
            candidate = int(order[(start + batch_size + spare) % num_images])
            if try_read(candidate):
                num_unmatched -= 1
                if num_unmatched == 0:
                    return candidate
    return None


class ReplacementLimit:
    """The limit `data.max_replaced` on the replacements per pass, with one warning per image.

    Attributes:
        num_replaced: Number of images replaced so far, over all passes.
    """

    def __init__(self, source: Source, num_images: int, max_replaced: float):
        """Let a share of the images be replaced per pass, and at least one unless the share is 0.

        Args:
            source: Source of the images, for messages.
            num_images: Number of images per pass.
            max_replaced: Share of the images that may be replaced, from `data.max_replaced`.
        """
        self.num_replaced = 0
        self._source, self._num_images = source, num_images
        self._max_share = max_replaced * (BETON_LIMIT_FACTOR if isinstance(source, Beton) else 1.0)
        self._max_per_pass = max(1, int(self._max_share * num_images)) if self._max_share > 0 else 0
        self._num_in_pass, self._num_reported = 0, 0
        self._warned_names: set[str] = set()

    def begin_pass(self) -> None:
        """Reset the number of images replaced in the pass."""
        self._num_in_pass = 0

    def add(self, replacements: Sequence[Replacement], warns: bool = True) -> None:
        """Count replacements and warn about each new unreadable image.

        Args:
            replacements: Replacements since the last call.
            warns: False if the caller reports the unreadable images itself.

        Raises:
            ValueError: If this pass has more replacements than the limit.
        """
        for replacement in replacements:
            if warns and replacement.unreadable_name not in self._warned_names:
                self._warned_names.add(replacement.unreadable_name)
                warnings.warn(replacement.message, stacklevel=5)
        self.num_replaced += len(replacements)
        self._num_in_pass += len(replacements)
        if replacements:
            self.check(self._num_in_pass, replacements[-1].message)

    def count_over_ranks(self, is_reported: bool) -> int:
        """Count the replacements of all ranks and apply the limit, in a collective on the CPU.

        Args:
            is_reported: True if the caller reports the result. The next count then starts from 0.

        Returns:
            Number of images that all ranks have replaced since the last report.

        Raises:
            ValueError: If the ranks have replaced too many images in this pass.
        """
        num_unreported = self.num_replaced - self._num_reported
        counts = collectives.gather_objects((self._num_in_pass, num_unreported))
        self.check(sum(num_in_pass for num_in_pass, _ in counts))
        if is_reported:
            self._num_reported = self.num_replaced
        return sum(num_unreported for _, num_unreported in counts)

    def check(self, num_replaced: int, example: str = "") -> None:
        """Raise ValueError if this many replacements in one pass are more than the limit.

        Args:
            num_replaced: Number of replacements in the pass.
            example: Message about one of them.
        """
        if num_replaced <= self._max_per_pass:
            return
        remedy = "restore the files, remove them from the data set, or raise data.max_replaced"
        if isinstance(self._source, Beton):
            remedy = (
                "all images were readable when the file was written, so the file is damaged now; "
                "find the damaged images with `python -m ssl_pretrain.data.beton check`, then copy "
                "or write the file again"
            )
        example_text = f"; the last: {example}" if example else ""
        raise ValueError(
            f"data.max_replaced: {num_replaced:,} of {self._num_images:,} images of "
            f"{self._source.full_path} could not be read in one pass, more than the "
            f"{self._max_per_pass:,} that may be replaced ({self._max_share:.3g} of the images)"
            f"{example_text}; {remedy}"
        )
