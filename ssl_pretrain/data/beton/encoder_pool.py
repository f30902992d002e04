"""Encode the images of a source in several processes, in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ssl_pretrain.data.beton.encoder import Entry, Settings, encode_entry
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.native.decode import Decoder

_CHUNK = 32  # images per job
_JOBS_PER_WORKER = 4  # jobs that may wait to be written

EncodedImage = tuple[Entry, bytes]

_worker: tuple[Source, Settings, Decoder]  # in each process


def encoded_images(
    source: Source, settings: Settings, num_workers: int, first: int, end: int
) -> Iterator[EncodedImage]:
    """Yield the entries and the bytes of images `first` to `end`, in order.

    Raises:
        RuntimeError: If a process is killed.
    """
    jobs = [range(start, min(start + _CHUNK, end)) for start in range(first, end, _CHUNK)]
    if num_workers > 1 and len(jobs) > 1:
        chunks = _encode_in_processes(source, settings, num_workers, jobs)
    else:
        chunks = _encode_in_this_process(source, settings, jobs)
    try:
        for chunk in chunks:
            yield from chunk
    finally:
        chunks.close()


_Chunks = Generator[list[EncodedImage], None, None]


def _encode_in_this_process(source: Source, settings: Settings, jobs: list[range]) -> _Chunks:
    _start(source, settings)
    try:
        yield from map(_encode_chunk, jobs)
    finally:
        _worker[2].close()


def _encode_in_processes(
    source: Source, settings: Settings, num_workers: int, jobs: list[range]
) -> _Chunks:
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(num_workers, context, _start, (source, settings))
    waiting: deque[Future[list[EncodedImage]]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_encode_chunk, job))
            if len(waiting) > _JOBS_PER_WORKER * num_workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process was killed; if that was for memory, give fewer --workers; "
            "the same write again goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(source: Source, settings: Settings) -> None:
    """Prepare a process, which ends with its parent even if that is killed."""
    global _worker
    _worker = source, settings, Decoder()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_chunk(indices: range) -> list[EncodedImage]:
    source, settings, decoder = _worker
    return [encode_entry(source, index, settings, decoder) for index in indices]
