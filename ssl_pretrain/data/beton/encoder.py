"""Encode the images of a source in several processes.

An image is stored as its original bytes, as a new JPEG, or as pixels.
"""

import contextlib
import io
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ssl_pretrain.data.beton.tables import JPEG, RAW
from ssl_pretrain.data.image_source import EncodedSource, Source
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.jpeg import is_intact
from ssl_pretrain.system.platform_support import START_METHOD

# Outcomes. A readable image is stored unchanged, as a new JPEG, or as pixels.
UNCHANGED, NEW_JPEG, PIXELS, UNREADABLE = range(4)
# Small images that are not JPEGs are stored as pixels, because a JPEG would save little.
_MAX_RAW_BYTES = 16384
_MAX_JPEG_SIDE = 65535
_JPEG_SIGNATURE = b"\xff\xd8"
_ORIENTATION_TAG = 0x0112
_IMAGES_PER_JOB = 32
_JOBS_PER_WORKER = 4  # limit on the pending jobs


@dataclass(frozen=True)
class EncodingSettings:
    """Settings that determine the content of a .beton file."""

    max_side: int = 500  # longest side of an image in pixels; 0 for no limit
    quality: int = 95  # JPEG quality of newly encoded images
    page_size: int = 1 << 23  # bytes; FFCV reads whole pages, so no image spans two of them


class Entry(NamedTuple):
    """Table entry of one image, without its bytes."""

    outcome: int
    mode: int = 0
    width: int = 0
    height: int = 0
    offset: int = 0  # position of the first byte in the file
    length: int = 0  # number of bytes
    label: int = -1
    crc: int = 0  # CRC-32 of the bytes


EncodedImage = tuple[Entry, bytes]


def encode_image(source: Source, index: int, settings: EncodingSettings) -> EncodedImage:
    """Encode one image and return its table entry and the bytes to store.

    The entry has an outcome, a mode and a size. Its other fields are not set.

    Raises:
        UnreadableImage: If the image cannot be read, or is too large for a JPEG.
    """
    content = source.read_bytes(index) if isinstance(source, EncodedSource) else b""
    is_jpeg = content.startswith(_JPEG_SIGNATURE)
    size = _size_if_storable(content, settings.max_side) if is_jpeg else None
    if size is not None and is_intact(content, height=size[1], width=size[0]):
        return Entry(UNCHANGED, JPEG, *size), content
    pixels = _limit_size(np.ascontiguousarray(source.read(index)), settings.max_side)
    height, width = pixels.shape[:2]
    if pixels.nbytes <= _MAX_RAW_BYTES and not is_jpeg:
        return Entry(PIXELS, RAW, width, height), pixels.tobytes()
    if max(height, width) > _MAX_JPEG_SIDE:
        raise UnreadableImage(
            f"{source.name(index)}: {width}x{height} pixels exceed the limit of "
            f"{_MAX_JPEG_SIDE:,} per side of a JPEG; give --max-side"
        )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=settings.quality)
    return Entry(NEW_JPEG, JPEG, width, height), file.getvalue()


def _limit_size(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Shrink an image whose longer side exceeds `max_side`."""
    height, width = pixels.shape[:2]
    if not 0 < max_side < max(height, width):
        return pixels
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _size_if_storable(content: bytes, max_side: int) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG, or None if it must be converted, resized or rotated."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        is_upright = image.getexif().get(_ORIENTATION_TAG, 1) == 1
        if image.mode in ("RGB", "L") and is_upright and not 0 < max_side < max(image.size):
            return image.size
    return None


_worker_state: tuple[Source, EncodingSettings]  # set by `_init_worker` in each process


def encode_images(
    source: Source, settings: EncodingSettings, num_workers: int, start: int, end: int
) -> Iterator[EncodedImage]:
    """Yield the entry and the bytes of each image from `start` up to `end`, in order.

    Raises:
        RuntimeError: If a worker process is killed.
    """
    job_starts = range(start, end, _IMAGES_PER_JOB)
    jobs = [range(first, min(first + _IMAGES_PER_JOB, end)) for first in job_starts]
    if num_workers > 1 and len(jobs) > 1:
        job_results = _encode_in_processes(source, settings, num_workers, jobs)
    else:
        job_results = _encode_in_this_process(source, settings, jobs)
    with contextlib.closing(job_results):
        for images in job_results:
            yield from images


_JobResults = Generator[list[EncodedImage], None, None]


def _encode_in_this_process(
    source: Source, settings: EncodingSettings, jobs: list[range]
) -> _JobResults:
    _init_worker(source, settings)
    yield from map(_encode_job, jobs)


def _encode_in_processes(
    source: Source, settings: EncodingSettings, num_workers: int, jobs: list[range]
) -> _JobResults:
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(num_workers, context, _init_worker, (source, settings))
    futures: deque[Future[list[EncodedImage]]] = deque()
    try:
        for job in jobs:
            futures.append(pool.submit(_encode_job, job))
            if len(futures) > _JOBS_PER_WORKER * num_workers:
                yield futures.popleft().result()
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, which happens when memory runs out; repeat the command "
            "to continue, with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _init_worker(source: Source, settings: EncodingSettings) -> None:
    """Set up this worker, and make it exit when its parent does, even if the parent is killed."""
    global _worker_state
    _worker_state = source, settings
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _encode_job(indices: range) -> list[EncodedImage]:
    source, settings = _worker_state
    return [_encode_or_mark_unreadable(source, index, settings) for index in indices]


def _encode_or_mark_unreadable(
    source: Source, index: int, settings: EncodingSettings
) -> EncodedImage:
    """Return the entry of an image, without its offset in the file, and the bytes to store.

    An unreadable image has the outcome `UNREADABLE` and no bytes.
    """
    label = source.label(index)
    try:
        entry, content = encode_image(source, index, settings)
    except UnreadableImage:
        return Entry(UNREADABLE, label=label), b""
    return entry._replace(length=len(content), label=label, crc=zlib.crc32(content)), content
