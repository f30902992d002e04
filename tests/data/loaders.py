"""Loaders for tests, built with one call."""

import hashlib
import itertools

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.loader import Loader
from ssl_pretrain.data.order import BatchPlan
from ssl_pretrain.data.readers import ReaderKind, build_reader
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import ViewsConfig


def build_loader(
    source: Source,
    views: ViewsConfig,
    kind: str = "folder",
    *,
    seed: int = 3,
    global_batch_size: int = 12,
    rank: int = 0,
    world_size: int = 1,
    window: int = 0,
    max_replaced: float = DataConfig.max_replaced,
    **reader_options,
) -> Loader:
    plan = BatchPlan(seed, len(source), global_batch_size, rank, world_size, window)
    reader = build_reader(source, views, plan, ReaderKind(kind), **reader_options)
    return Loader(reader, max_replaced=max_replaced)


def digest(batch: Batch) -> str:
    """Return one digest of all tensors of a batch on the CPU."""
    sha256 = hashlib.sha256()
    mask_tensors = [tensor for masks in batch.masks for tensor in (masks.indices, masks.valid)]
    text_tensors = [tensor for texts in batch.texts for tensor in (texts.ids, texts.valid)]
    for tensor in (*batch.views, batch.labels, batch.indices, *mask_tensors, *text_tensors):
        sha256.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        sha256.update(tensor.contiguous().numpy().tobytes())
    return sha256.hexdigest()


def digests(loader: Loader, first_step: int, count: int) -> list[str]:
    """Return the digests of `count` batches from `first_step` on, and close the loader."""
    with loader:
        return [digest(batch) for batch in itertools.islice(loader.iterate_from(first_step), count)]
