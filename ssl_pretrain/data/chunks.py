"""Chunks of crops and texts, the loader's unit of work, and the data set that makes them."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.images import UnreachableSource, UnreadableImage
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.replacement import Replacement, find_spare
from ssl_pretrain.data.shared_memory import SharedMemoryFull, allocate
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.views.tokenizers import TokenArrays

# A picklable function that cuts all crops, uint8 (3, height, width), from one image of the same
# layout. Its other arguments are the epoch and the image's index.
CropFunction = Callable[[Tensor, int, int], list[Tensor]]
_NO_PIXELS = np.empty((0, 0, 0), np.uint8)


class ChunkRequest(NamedTuple):
    """The images of one chunk.

    Attributes:
        epoch: Number of completed passes over the data.
        indices: Indices of the images in the source.
        step: Step whose batch contains the chunk.
        first_row: Row of the first image in this rank's batch.
    """

    epoch: int
    indices: np.ndarray
    step: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class Chunk:
    """The crops of a few images, and their texts.

    Attributes:
        pixels: Flat uint8 tensor with view 0 of all images, then view 1, and so on. A single tensor
            needs one block of shared memory and one copy to the device.
        shapes: Shape of each view.
        labels: Labels of the images, int64 (n,).
        replacements: Records of the images that could not be read.
        seconds: Time spent on the chunk.
        error: Error that left the chunk incomplete, or None. The trainer raises it, so the user
            sees its message instead of a worker's traceback.
        tokens: Tokens of the texts, one set per text of an item.
    """

    pixels: Tensor
    shapes: list[torch.Size]
    labels: np.ndarray
    replacements: list[Replacement]
    seconds: float = 0.0
    error: Exception | None = None
    tokens: tuple[TokenArrays, ...] = ()

    def pin_memory(self) -> Self:
        """Copy the pixels to pinned memory. PyTorch's DataLoader calls this method."""
        return replace(self, pixels=self.pixels.pin_memory())

    def to(self, device: torch.device) -> Self:
        """Copy the pixels to a device without waiting for the copy."""
        return replace(self, pixels=self.pixels.to(device, non_blocking=True))

    def views(self) -> list[Tensor]:
        """Return the views, each uint8 (n, 3, height, width), without copying the pixels."""
        n = len(self.labels)
        blocks = self.pixels.split([n * shape.numel() for shape in self.shapes])
        return [block.view(n, *shape) for block, shape in zip(blocks, self.shapes)]


class ChunkPool(Protocol):
    """A pool of worker processes, compiled threads or device kernels that makes chunks."""

    def make_chunks(self, requests: Iterable[ChunkRequest]) -> Iterator[Chunk]:
        """Return the chunks in the order of their requests. A new call ends the previous one."""
        ...

    def close(self) -> None:
        """Release processes, threads, files and memory. A second call does nothing."""
        ...


class CropDataset(Dataset[Chunk]):
    """Data set that makes one chunk per request and reads each image once for all of its crops.

    Args:
        source: Source of the images.
        crop_image: Function that cuts all crops of one image. None if only texts are read.
        plan: Order of the run, which determines the replacements of unreadable images. Without a
            plan, as in a single pass, the next image of the source is the replacement.
        text_maker: The texts of the images. By default they have none.
    """

    def __init__(
        self,
        source: Source,
        crop_image: CropFunction | None,
        plan: BatchPlan | None = None,
        text_maker: TextMaker | None = None,
    ):
        self.source, self.crop_image, self.plan = source, crop_image, plan
        self.text_maker = text_maker or TextMaker(source)

    def __getitem__(self, request: ChunkRequest) -> Chunk:
        start = time.perf_counter()
        labels = np.empty(len(request.indices), np.int64)
        chunk = Chunk(torch.empty(0, dtype=torch.uint8), [], labels, replacements=[])
        shown_indices = np.empty(len(labels), np.int64)
        for row, index in enumerate(request.indices.tolist()):
            try:
                pixels, shown_index = self._read_or_replace(request, row, chunk.replacements)
            except (FileNotFoundError, ValueError) as error:
                return replace(chunk, error=error)
            labels[row], shown_indices[row] = self.source.label(shown_index), shown_index
            if self.crop_image is None:
                continue
            with self._name_image_in_errors(shown_index):
                image = torch.from_numpy(pixels).permute(2, 0, 1)
                crops = self.crop_image(image, request.epoch, index)
                if row == 0:
                    num_bytes = len(labels) * sum(crop.numel() for crop in crops)
                    shapes = [crop.shape for crop in crops]
                    chunk = replace(chunk, pixels=allocate(num_bytes), shapes=shapes)
                for crop, view in zip(crops, chunk.views()):
                    view[row] = crop
        tokens = self.text_maker.make(shown_indices, request.epoch, request.indices)
        return replace(chunk, tokens=tokens, seconds=time.perf_counter() - start)

    def _read_or_replace(
        self, request: ChunkRequest, row: int, replacements: list[Replacement]
    ) -> tuple[np.ndarray, int]:
        """Return the pixels for a row of the chunk, and the index of the image that they show.

        Raises:
            ValueError: If the image is unreadable and no image is left to replace it.
            FileNotFoundError: If the source's folder or file no longer exists.
        """
        index = int(request.indices[row])
        try:
            return self._read(index), index
        except UnreadableImage as error:
            reason = str(error)
        pixels = _NO_PIXELS

        def try_read(candidate: int) -> bool:
            nonlocal pixels
            try:
                pixels = self._read(candidate)
            except UnreadableImage:
                return False
            return True

        if self.plan is not None:
            spare = find_spare(self.plan, request.step, request.first_row + row, try_read)
        else:
            spare = self._find_next(index, request.indices, try_read)
        replacements.append(Replacement.create(self.source, index, reason, spare))
        return pixels, replacements[-1].spare_index

    def _read(self, index: int) -> np.ndarray:
        """Return the pixels of an image, if it has its texts."""
        try:
            with self._name_image_in_errors(index):
                if problem := self.text_maker.read_ahead(index):
                    raise UnreadableImage(problem)
                return _NO_PIXELS if self.crop_image is None else self.source.read(index)
        except UnreadableImage:
            self.source.check_present()
            raise

    @contextmanager
    def _name_image_in_errors(self, index: int) -> Iterator[None]:
        """Add the image's index and name to any unexpected error."""
        try:
            yield
        except (UnreadableImage, UnreachableSource, SharedMemoryFull):
            raise
        except Exception as error:
            raise RuntimeError(
                f"image {index}, {self.source.name(index)}: {type(error).__name__}: {error}"
            ) from error

    def _find_next(
        self, index: int, chunk_indices: np.ndarray, try_read: Callable[[int], bool]
    ) -> int | None:
        """Return the index of the next readable image, preferably one outside the chunk."""
        candidates = [*range(index + 1, len(self.source)), *range(index)]
        # The sort is stable and moves the images outside the chunk to the front.
        candidates.sort(key=set(chunk_indices.tolist()).__contains__)
        return next(filter(try_read, candidates), None)
