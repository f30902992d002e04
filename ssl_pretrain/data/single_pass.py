"""Read images once and in order, for evaluations."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.chunks import ChunkRequest, CropDataset
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.replacement import ReplacementLimit
from ssl_pretrain.data.shared_memory import Transfer, plan_transfer
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.data.workers import ProcessPool
from ssl_pretrain.distributed import process_group


def read_images(
    source: Source,
    indices: Sequence[int] | np.ndarray | None,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    num_workers: int,
    max_replaced: float = DataConfig.max_replaced,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read images in the given order, each once, without anything random.

    Args:
        source: The images.
        indices: Numbers of the images to read, (n,). None for all.
        transform: Makes the view of an image, uint8 (3, height, width) -> uint8 (3, s, s). It has
            to be picklable, like `partial(crops.evaluate, size=32)`.
        batch_size: Images per batch. The last batch has the rest.
        num_workers: Number of processes, 0 to read in this one.
        max_replaced: Share of the images that may be unreadable, as in `data.max_replaced`.

    Yields:
        Pixels uint8 (batch, 3, s, s) and labels int64 (batch,), on the CPU. An unreadable image is
        replaced by the next readable one with its label, and its file is named in a warning.

    Raises:
        ValueError: If more images are unreadable than `max_replaced` allows.
    """
    numbers = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    num_workers = min(num_workers, len(batches))
    dataset = CropDataset(source, partial(_make_view, transform))
    transfer = Transfer(batch_size)
    if num_workers:
        first = dataset[ChunkRequest(0, numbers[:1])]
        if first.error is not None:
            raise first.error
        transfer = plan_transfer(
            first.pixels.numel(),
            batch_size,
            num_workers,
            num_chunks_ahead=2 * num_workers,
            num_images_held=2 * batch_size,
            num_ranks=process_group.local_world_size(),
        )
    size = transfer.chunk_size
    requests = [
        [ChunkRequest(0, batch[start : start + size]) for start in range(0, len(batch), size)]
        for batch in batches
    ]
    limit = ReplacementLimit(source, len(numbers), max_replaced)
    pool = ProcessPool(dataset, num_workers, transfer, pinned=False)
    try:
        chunks = pool.take(chain.from_iterable(requests))
        for batch_requests in requests:
            pixels, labels = [], []
            for chunk in islice(chunks, len(batch_requests)):
                limit.add(chunk.replacements)
                if chunk.error is not None:
                    raise chunk.error
                pixels.append(chunk.views()[0])
                labels.append(chunk.labels)
            pixels_of_batch = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            yield pixels_of_batch, torch.from_numpy(np.concatenate(labels))
    finally:
        pool.close()


def _make_view(
    transform: Callable[[Tensor], Tensor], image: Tensor, _epoch: int, _index: int
) -> list[Tensor]:
    return [transform(image)]
