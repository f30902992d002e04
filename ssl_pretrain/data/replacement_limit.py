"""Count the images that were replaced, and end the run if there are too many of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.replacement import Replacement
from ssl_pretrain.distributed import collectives

BETON_FACTOR = 0.1  # a .beton may lose fewer images, as all were readable when it was written


class ReplacementLimit:
    """Enforces `data.max_replaced` over one pass after another, and warns of each file once.

    Attributes:
        total: Replaced images of all passes so far.
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
        self._in_pass, self._num_reported = 0, 0
        self._files: set[str] = set()

    def begin_pass(self) -> None:
        """Start to count from 0 towards the limit."""
        self._in_pass = 0

    def add(self, replacements: Sequence[Replacement]) -> None:
        """Count replacements.

        Raises:
            ValueError: The pass has too many of them.
        """
        for replacement in replacements:
            if replacement.file not in self._files:
                self._files.add(replacement.file)
                warnings.warn(replacement.message, stacklevel=5)
        self.total += len(replacements)
        self._in_pass += len(replacements)
        if replacements:
            self._check(self._in_pass, replacements[-1].message)

    def add_ranks(self, report: bool) -> int:
        """Apply the limit to the sum of all ranks. A collective on the CPU.

        Args:
            report: Count the images that are returned as reported.

        Returns:
            Images that all ranks have replaced since the last report.

        Raises:
            ValueError: The ranks have replaced too many images in this pass.
        """
        counts = collectives.gather_objects((self._in_pass, self.total - self._num_reported))
        self._check(sum(in_pass for in_pass, _ in counts))
        if report:
            self._num_reported = self.total
        return sum(unreported for _, unreported in counts)

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
