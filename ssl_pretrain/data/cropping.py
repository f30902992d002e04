"""Read images and cut their crops, in worker processes or in the trainer itself."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pretrain.data.chunks import Chunk, ChunkRequest
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.order import Plan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.data.shared_memory import SharedMemoryFull, allocate

# (image uint8 (3, height, width), epoch, index) -> each crop, uint8 (3, size, size). Picklable.
Cut = Callable[[Tensor, int, int], list[Tensor]]


class CropDataset(Dataset[Chunk]):
    """Makes the chunk of a request. Each image is read once, however many crops are cut from it."""

    def __init__(self, source: Source, cut: Cut, plan: Plan | None = None):
        """Read from a source.

        Args:
            source: The images.
            cut: Cuts all crops of one image.
            plan: The order of the run, from which an unreadable image gets its replacement. None
                for a single pass, in which the next image of the source replaces it.
        """
        self.source = source
        self.cut = cut
        self.plan = plan

    def __getitem__(self, request: ChunkRequest) -> Chunk:
        start = time.perf_counter()
        labels = np.empty(len(request.indices), np.int64)
        replacements: list[Replacement] = []
        chunk = Chunk(torch.empty(0, dtype=torch.uint8), [], labels, replacements)
        blocks: list[Tensor] = []
        for row, index in enumerate(request.indices.tolist()):
            try:
                pixels, number = self._read_or_replace(request, row, replacements)
            except (FileNotFoundError, ValueError) as error:
                return Chunk(
                    torch.empty(0, dtype=torch.uint8), [], labels, replacements, error=error
                )
            labels[row] = self.source.label(number)
            with self._naming_image(number):
                crops = self.cut(torch.from_numpy(pixels).permute(2, 0, 1), request.epoch, index)
                if row == 0:
                    num_bytes = len(labels) * sum(crop.numel() for crop in crops)
                    shapes = [crop.shape for crop in crops]
                    chunk = replace(chunk, pixels=allocate(num_bytes), shapes=shapes)
                    blocks = chunk.views()
                for crop, block in zip(crops, blocks):
                    block[row] = crop
        return replace(chunk, seconds=time.perf_counter() - start)

    def _read_or_replace(
        self, request: ChunkRequest, row: int, replacements: list[Replacement]
    ) -> tuple[np.ndarray, int]:
        """Return the pixels for a row of the chunk, and the number of the image that they show.

        Raises:
            ValueError: The image is unreadable, and no image is left that could replace it.
            FileNotFoundError: The source's folder or file no longer exists.
        """
        index = int(request.indices[row])
        try:
            return self._read(index), index
        except UnreadableImage as error:
            reason = str(error)
        pixels = np.empty(0, np.uint8)

        def try_read(number: int) -> bool:
            nonlocal pixels
            try:
                pixels = self._read(number)
            except UnreadableImage:
                return False
            return True

        if self.plan is not None:
            number = find_spare(self.plan, request.step, request.first_row + row, try_read)
        else:
            number = self._find_next(index, request.indices, try_read)
        replacement = Replacement.create(self.source, index, reason, number)
        replacements.append(replacement)
        return pixels, replacement.number

    def _read(self, number: int) -> np.ndarray:
        try:
            with self._naming_image(number):
                return self.source.read(number)
        except UnreadableImage:
            self.source.check_present()
            raise

    @contextmanager
    def _naming_image(self, number: int) -> Iterator[None]:
        """Name the image in any error that no rule covers."""
        try:
            yield
        except (UnreadableImage, SharedMemoryFull):
            raise
        except Exception as error:
            raise RuntimeError(
                f"image {number}, {self.source.name(number)}: {type(error).__name__}: {error}"
            ) from error

    def _find_next(
        self, index: int, chunk: np.ndarray, try_read: Callable[[int], bool]
    ) -> int | None:
        """Return the next readable image of the source, preferably one outside the chunk."""
        n, in_chunk = len(self.source), set(chunk.tolist())
        following = [(index + offset) % n for offset in range(1, n)]
        following.sort(key=in_chunk.__contains__)  # stable: those outside the chunk come first
        return next((number for number in following if try_read(number)), None)
