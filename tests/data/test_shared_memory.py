"""Workers stay within the free shared memory, or an error names the shortage."""

import itertools
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loaders import build_loader

from ssl_pretrain.data.readers import read_images
from ssl_pretrain.data.shared_memory import SHARED_MEMORY_REMEDY, plan_transfer
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.views import crops
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig

MIB = 2**20
VIEWS = ViewsConfig(crops={"global": Crop(count=2, size=32)})
IMAGE_BYTES = 2 * 3 * 32 * 32


def set_free_bytes(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda path: SimpleNamespace(total=free_bytes, used=0, free=free_bytes),
    )


@pytest.mark.parametrize(
    ("free_bytes", "num_workers", "num_ranks", "chunk_size", "copies_chunks"),
    [
        # 4 chunks of 32 ahead and 2 batches of 64 held make 256 images of 0.1 MiB.
        (64 * MIB, 2, 1, 32, False),
        (16 * MIB, 2, 1, 25, True),
        (16 * MIB, 2, 4, 6, True),
        (16 * MIB, 16, 1, 3, True),
        (1 * MIB, 0, 1, 32, False),  # nothing is sent
    ],
)
def test_chunks_shrink_with_the_free_memory(
    monkeypatch, free_bytes, num_workers, num_ranks, chunk_size, copies_chunks
):
    set_free_bytes(monkeypatch, free_bytes)
    transfer = plan_transfer(
        MIB // 10, 32, num_workers, num_chunks_ahead=4, num_images_held=128, num_ranks=num_ranks
    )
    assert (transfer.chunk_size, transfer.copies_chunks, bool(transfer.note)) == (
        chunk_size,
        copies_chunks,
        copies_chunks,
    )


def test_too_little_memory_for_single_images_is_refused(monkeypatch):
    set_free_bytes(monkeypatch, MIB)
    with pytest.raises(ValueError) as error:
        plan_transfer(MIB, 32, 4, num_chunks_ahead=4, num_images_held=128, num_ranks=2)
    assert str(error.value) == (
        "data.num_workers: 4 workers for each of 2 ranks on this machine have at least 18 images "
        f"of 1.00 MiB in flight, and /dev/shm has 1.0 MiB free; {SHARED_MEMORY_REMEDY}"
    )


def load_batches(num_workers: int) -> list[Batch]:
    source = open_source(DataConfig(source="digits"), "train")
    with build_loader(source, VIEWS, global_batch_size=64, num_workers=num_workers) as loader:
        return list(itertools.islice(loader.iterate_from(0), 4))


def test_small_chunks_give_the_same_batches(monkeypatch):
    expected = load_batches(0)
    set_free_bytes(monkeypatch, 20 * IMAGE_BYTES)
    for batch, expected_batch in zip(load_batches(2), expected, strict=True):
        assert torch.equal(batch.indices, expected_batch.indices)
        assert torch.equal(batch.labels, expected_batch.labels)
        assert all(torch.equal(*pair) for pair in zip(batch.views, expected_batch.views))


def test_small_chunks_give_the_same_images_to_evaluations(monkeypatch):
    source = open_source(DataConfig(source="digits"), "val")
    indices, transform = (
        np.arange(5, 105),
        partial(crops.evaluation_view, size=32, crop_ratio=1.0, interpolation="bilinear"),
    )
    expected = list(read_images(source, indices, transform, 32, 0))
    set_free_bytes(monkeypatch, 20 * 3 * 32 * 32)
    actual = list(read_images(source, indices, transform, 32, 2))
    assert [len(labels) for _, labels in actual] == [32, 32, 32, 4]
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, expected_batch))


def is_worker() -> bool:
    """Return False in the test process, where the transform is first tried on one image."""
    return torch.utils.data.get_worker_info() is not None


class FillSharedMemory:
    """Transform whose worker finds no free shared memory."""

    def __call__(self, image):
        def fail_to_allocate(size):
            raise RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)")

        if is_worker():
            torch.UntypedStorage._new_shared = fail_to_allocate
        return image[:, :8, :8].contiguous()


class BreakQueue:
    """Transform whose worker cannot send chunks through its queue."""

    def __call__(self, image):
        def allocate_unshared(size):
            return torch.UntypedStorage(size)

        def fail_to_share(storage):
            raise OSError(24, "Too many open files")

        if is_worker():
            torch.UntypedStorage._new_shared = allocate_unshared
            torch.UntypedStorage._share_fd_cpu_ = fail_to_share
        return image[:, :8, :8].contiguous()


def test_the_trainer_reports_a_worker_without_shared_memory():
    source = open_source(DataConfig(source="digits"), "val")
    with pytest.raises(ValueError) as error:
        list(read_images(source, None, FillSharedMemory(), 64, 2))
    message = str(error.value)
    assert message.startswith("data.num_workers: a worker's images do not fit into /dev/shm: ")
    assert "No space left on device" in message
    assert "--shm-size=8g or --ipc=host" in message


def test_the_trainer_reports_a_worker_that_cannot_send():
    source = open_source(DataConfig(source="digits"), "val")
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(read_images(source, None, BreakQueue(), 64, 2))
