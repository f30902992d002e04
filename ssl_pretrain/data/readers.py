"""Read the images of a source, at random for training and once in order for evaluations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.chunks import ChunkPool, ChunkRequest, CropDataset
from ssl_pretrain.data.device_cache import DeviceCache
from ssl_pretrain.data.image_source import EncodedSource, Source
from ssl_pretrain.data.native import ffcv
from ssl_pretrain.data.native.threads import ThreadPool
from ssl_pretrain.data.native.view_makers import DecodedImages, FFCVImages, Images
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.replacement import Replacement, ReplacementLimit
from ssl_pretrain.data.shared_memory import Transfer, plan_transfer
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.data.tar.tar_source import TarShards
from ssl_pretrain.data.text_maker import TextMaker
from ssl_pretrain.data.workers import ProcessPool
from ssl_pretrain.distributed import process_group
from ssl_pretrain.views import crops, recipe
from ssl_pretrain.views.recipe import Crop, ViewsConfig

# Images per chunk. With small chunks, all workers share the first batch, and the chunks in flight
# need little shared memory.
MAX_CHUNK_SIZE = 64
MIN_CHUNK_SIZE = 16
NUM_BATCHES_AHEAD = 2  # batches that are prepared while the trainer uses one

# Function that changes a view, given (view uint8 (C, s, s), epoch, index). It must be picklable.
ViewAugmentation = Callable[[Tensor, int, int], Tensor]


class ReaderKind(StrEnum):
    """Ways to read images. The values are those of `data.loader` and `data.cache`."""

    PROCESSES = "folder"
    THREADS = "threads"
    FFCV = "ffcv"
    DEVICE_CACHE = "device"


@dataclass(frozen=True)
class Reader:
    """The images of a run, and the pool that reads them and cuts their crops.

    Attributes:
        kind: Way to read the images.
        source: The images.
        views: Recipe of the views.
        plan: Order of the images.
        device: Device of the batches.
        num_workers: Number of processes or threads.
        chunk_size: Images per chunk.
        pool: Pool that prepares the chunks.
        note: Message for the user, which may be empty.
    """

    kind: ReaderKind
    source: Source
    views: ViewsConfig
    plan: BatchPlan
    device: torch.device
    num_workers: int
    chunk_size: int
    pool: ChunkPool
    note: str = ""


def build_reader(
    source: Source,
    views: ViewsConfig,
    plan: BatchPlan,
    kind: ReaderKind = ReaderKind.PROCESSES,
    *,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    augment: ViewAugmentation | None = None,
    text_maker: TextMaker | None = None,
) -> Reader:
    """Build the pool that reads the images and cuts their crops.

    Args:
        source: The images.
        views: Recipe of the views. Without crops, processes read only texts, if there are any.
        plan: Order of the images.
        kind: Way to read the images.
        num_workers: Number of processes or threads.
        device: Device of the batches.
        augment: Function that changes each crop. Only processes support it.
        text_maker: The texts of the images. By default they have none.

    Raises:
        ValueError: If a key of `views` is invalid, or the images do not fit in memory.
    """
    has_texts = text_maker is not None and text_maker.num_texts > 0
    if views.crops or not has_texts:
        recipe.check(views)
    is_supported = (augment is None and bool(views.crops)) or kind is ReaderKind.PROCESSES
    assert is_supported, "only processes support augment and texts without images"
    device, view_crops = torch.device(device), recipe.crop_per_view(views)
    chunk_size, note = plan.local_batch_size, ""
    pool: ChunkPool
    if kind is ReaderKind.DEVICE_CACHE:
        pool = DeviceCache(source, view_crops, plan, device, text_maker)
    elif kind in (ReaderKind.THREADS, ReaderKind.FFCV):
        images: Images
        if kind is ReaderKind.FFCV:
            assert isinstance(source, Beton), "FFCV only reads .beton files"
            images = FFCVImages(source, view_crops, plan.local_batch_size, plan.seed)
        else:
            images = DecodedImages(source, view_crops, plan.local_batch_size, plan.seed)
        pool = ThreadPool(
            source, images, view_crops, plan, num_workers, NUM_BATCHES_AHEAD, device, text_maker
        )
    else:
        if num_workers:
            chunk_size = min(MAX_CHUNK_SIZE, max(MIN_CHUNK_SIZE, -(-chunk_size // num_workers)))
        transfer = plan_transfer(
            source.num_channels * sum(crop.num_pixels for crop in view_crops),
            chunk_size,
            num_workers,
            num_chunks_ahead=NUM_BATCHES_AHEAD * -(-plan.local_batch_size // chunk_size),
            num_images_held=2 * plan.local_batch_size,
            num_ranks=process_group.local_world_size(),
        )
        chunk_size, note = transfer.chunk_size, transfer.note
        cut = partial(_cut_crops, view_crops, plan.seed, augment) if view_crops else None
        dataset = CropDataset(source, cut, plan, text_maker)
        pool = ProcessPool(dataset, num_workers, transfer, pin_memory=device.type == "cuda")
    return Reader(kind, source, views, plan, device, num_workers, chunk_size, pool, note)


def choose_reader_kind(data: DataConfig, source: Source) -> tuple[ReaderKind, str]:
    """Return the way to read this source, and the reason.

    Raises:
        ValueError: If `data.loader` cannot read this source, or FFCV is missing.
    """
    if data.cache == "device":
        return ReaderKind.DEVICE_CACHE, "data.cache asks for all images on the device"
    if data.loader == "folder":
        return ReaderKind.PROCESSES, "data.loader is set to folder"
    if data.loader == "ffcv":
        if not isinstance(source, Beton):
            raise ValueError(
                f"data.loader: ffcv only reads .beton files, and {source.full_path} is not one; "
                "python -m ssl_pretrain.data.beton write creates one, or set data.loader=auto"
            )
        if source.num_channels != 3:
            raise ValueError(
                f"data.loader: ffcv decodes images of 3 channels, and data.channels is "
                f"{source.num_channels}; set data.loader=threads"
            )
        ffcv.load_library()
        return ReaderKind.FFCV, "data.loader is set to ffcv"
    if data.loader == "threads":
        if not isinstance(source, EncodedSource):
            raise ValueError(
                f"data.loader: threads only read image files and .beton files, and "
                f"{source.full_path} is neither; set data.loader=auto"
            )
        return ReaderKind.THREADS, "data.loader is set to threads"
    if isinstance(source, Beton):
        return ReaderKind.THREADS, f"{source.full_path} is a .beton"
    if isinstance(source, TarShards):
        return ReaderKind.THREADS, f"{source.full_path} are tar shards"
    return ReaderKind.PROCESSES, (
        f"{source.full_path} is not a .beton; python -m ssl_pretrain.data.beton write creates one, "
        "which is read faster"
    )


def _cut_crops(
    view_crops: list[Crop],
    seed: int,
    augment: ViewAugmentation | None,
    image: Tensor,
    epoch: int,
    index: int,
) -> list[Tensor]:
    _, height, width = image.shape
    views = [
        crops.apply(image, crops.draw_box(crop, seed, epoch, index, view, height, width), crop)
        for view, crop in enumerate(view_crops)
    ]
    if augment is None:
        return views
    return [augment(view, epoch, index) for view in views]


def read_images(
    source: Source,
    indices: Sequence[int] | np.ndarray | None,
    transform: Callable[[Tensor], Tensor],
    batch_size: int,
    num_workers: int,
    max_replaced: float = DataConfig.max_replaced,
    report_replaced: Callable[[Sequence[Replacement]], None] | None = None,
    limit: ReplacementLimit | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Read each image once, in the given order and without randomness.

    Args:
        source: The images.
        indices: Indices of the images to read, (n,). None stands for all images.
        transform: Picklable function from an image, uint8 (C, height, width), to its view, uint8
            (C, s, s), such as `partial(crops.evaluation_view, size=32)`.
        batch_size: Images per batch. The last batch may be smaller.
        num_workers: Number of worker processes. With 0, this process reads the images.
        max_replaced: Share of the images that may be unreadable, as in `data.max_replaced`.
        report_replaced: Function that is called with the unreadable images of a batch, before that
            is yielded, and replaces the warnings.
        limit: Limit on the unreadable images, in place of `max_replaced` of these images. It is for
            images that are read in several calls.

    Yields:
        Pixels uint8 (batch, C, s, s) and labels int64 (batch,), on the CPU. An unreadable image
        and its label are replaced by the next readable image and the label of that one. A warning
        names the unreadable file.

    Raises:
        ValueError: If more images are unreadable than the limit allows.
    """
    order = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    num_workers = min(num_workers, len(batches))
    dataset = CropDataset(source, partial(_make_view, transform))
    transfer = Transfer(batch_size)
    if num_workers:
        first_chunk = dataset[ChunkRequest(0, order[:1])]
        if first_chunk.error is not None:
            raise first_chunk.error
        transfer = plan_transfer(
            first_chunk.pixels.numel(),
            batch_size,
            num_workers,
            num_chunks_ahead=2 * num_workers,
            num_images_held=2 * batch_size,
            num_ranks=process_group.local_world_size(),
        )
    chunk_size = transfer.chunk_size
    requests = [
        [
            ChunkRequest(0, batch[start : start + chunk_size])
            for start in range(0, len(batch), chunk_size)
        ]
        for batch in batches
    ]
    limit = limit or ReplacementLimit(source, len(order), max_replaced)
    pool = ProcessPool(dataset, num_workers, transfer, pin_memory=False)
    try:
        chunks = pool.make_chunks(chain.from_iterable(requests))
        for batch_requests in requests:
            pixels, labels = [], []
            for chunk in islice(chunks, len(batch_requests)):
                limit.add(chunk.replacements, warns=report_replaced is None)
                if report_replaced is not None and chunk.replacements:
                    report_replaced(chunk.replacements)
                if chunk.error is not None:
                    raise chunk.error
                pixels.append(chunk.views()[0])
                labels.append(chunk.labels)
            batch_pixels = torch.cat(pixels) if len(pixels) > 1 else pixels[0]
            yield batch_pixels, torch.from_numpy(np.concatenate(labels))
    finally:
        pool.close()


def _make_view(
    transform: Callable[[Tensor], Tensor], image: Tensor, _epoch: int, _index: int
) -> list[Tensor]:
    return [transform(image)]
