"""Images -> one .beton file, by several processes. Stopped at any moment and started again, it ends with the same bytes.

The images' bytes go into `train.beton.writing` in the order of the source, each followed by its entry in
`train.beton.journal`; what a new start finds there and can verify, it keeps. The finished file is renamed into place.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow

from ssl_pretrain.data import progress_report
from ssl_pretrain.data.beton import file as beton_file
from ssl_pretrain.data.beton.file import IMAGE, JPEG, RAW
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.native.decode import Decoder
from ssl_pretrain.data.sources import Beton, Files, Source

KEPT, ENCODED, STORED_RAW, BAD = range(
    4
)  # what became of an image: its own bytes, a new JPEG, raw pixels, nothing
_FORMAT = 1  # of the journal, and of the rules below
_RAW_BYTES = 16384  # images that are no JPEG and at most this large stay pixels: nothing is gained by losing some
_RECORD = np.dtype(
    [("how", "u1"), *IMAGE.descr, ("length", "<u8"), ("label", "<i8"), ("crc", "<u4")]
)
_CHUNK = 32  # images a process makes at a time
_SYNC_BYTES = 64 << 20  # after so many, data and journal are on the disk itself
_VERIFIED = 1000  # last entries of a journal that are compared with the data: what a power cut may have torn


class Record(NamedTuple):
    """One entry of the journal, `_RECORD` in the file."""

    how: int
    mode: int = 0
    width: int = 0
    height: int = 0
    place: int = 0
    length: int = 0
    label: int = -1
    crc: int = 0


@dataclass(frozen=True)
class Settings:
    max_side: int = 500  # pixels; 0: every image as it is
    quality: int = 95  # of the JPEGs that are made
    page_size: int = 1 << 23  # bytes; FFCV reads pages, and no image crosses one


def write(
    source: Source,
    path: Path,
    settings: Settings,
    num_workers: int,
    first: int = 0,
    end: int | None = None,
) -> dict[str, Any]:
    """Writes images `first` to `end` of a source, or goes on with it, and returns the manifest.

    Raises:
        ValueError: another process writes the same file, an image is larger than a page, or no image is readable.
        RuntimeError: a process was killed.
    """
    end = len(source) if end is None else end
    values = (
        [list(source.values)] if isinstance(source, Files) and source.values is not None else []
    )
    of_source = _hash(
        source.fingerprint,
        asdict(settings),
        pillow,
        features.version("libjpeg_turbo"),
        _FORMAT,
        *values,
    )
    finished = _finished(path, _hash(of_source, first, end))
    if finished is not None:
        return finished
    path.parent.mkdir(parents=True, exist_ok=True)
    data_path, journal_path = (
        path.with_name(f"{path.name}.writing"),
        path.with_name(f"{path.name}.journal"),
    )
    start = beton_file.pages_begin(end - first, settings.page_size)
    with (
        _opened(journal_path) as journal,
        data_path.open("r+b" if data_path.exists() else "w+b") as data,
    ):
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing it") from None
        records = _resumed(journal, data, _hash(of_source, first, end), start)
        for record, content in _made(
            source, settings, num_workers, first + len(records), end, done=len(records)
        ):
            _append(records, record, content, data, journal, settings.page_size, start)
        manifest = {
            "written": _hash(of_source, first, end),
            "of_source": of_source,
            **_manifest(source, settings, np.array(records, _RECORD), first),
        }
        _finish(data, np.array(records, _RECORD), settings.page_size)
        if values:
            manifest["range"] = values[0]
        manifest["table_sha256"] = beton_file.table_sha256(data_path)
        # A kill between the two renames leaves a manifest with another file's hash, which `_finished` and every reader notice.
        _replace(beton_file.manifest_path(path), beton_file.sealed(manifest))
        os.replace(data_path, path)
        journal_path.unlink()
    return manifest


def encode(
    source: Source, index: int, settings: Settings, decoder: Decoder
) -> tuple[int, int, int, int, bytes]:
    """(what became of it, mode, width, height, the bytes to store). Raises UnreadableImage."""
    content = source.content(index) if isinstance(source, (Files, Beton)) else b""
    if content.startswith(b"\xff\xd8"):
        size = _fitting_size(content, settings.max_side)
        if size is not None and decoder.agrees(content, *size):
            return KEPT, JPEG, *size, content
    pixels = source.read(index)
    height, width = pixels.shape[:2]
    if settings.max_side and max(height, width) > settings.max_side:
        scale = settings.max_side / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        pixels = np.asarray(
            Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.LANCZOS)
        )
        height, width = pixels.shape[:2]
    if pixels.nbytes <= _RAW_BYTES and not content.startswith(b"\xff\xd8"):
        return STORED_RAW, RAW, width, height, np.ascontiguousarray(pixels).tobytes()
    if max(height, width) > 65535:
        raise UnreadableImage(
            f"{source.name(index)}: {width}x{height} pixels are more than a JPEG holds; give --max-side"
        )
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=settings.quality)
    return ENCODED, JPEG, width, height, file.getvalue()


def _fitting_size(content: bytes, max_side: int) -> tuple[int, int] | None:
    """Width and height of a grey or RGB JPEG that needs neither resizing nor turning; None of any other image."""
    with (
        contextlib.suppress(Exception),
        Image.open(io.BytesIO(content)) as image,
    ):  # what Pillow cannot open, `read` will name
        if (
            image.mode in ("RGB", "L")
            and image.getexif().get(0x0112, 1) == 1
            and not 0 < max_side < max(image.size)
        ):
            return image.size
    return None


# The processes. Each has the source; they send the bytes of one chunk at a time.

Made = Generator[list[tuple["Record", bytes]], None, None]  # chunk by chunk
_in_process: tuple[Source, Settings, Decoder]


def _start(source: Source, settings: Settings) -> None:
    global _in_process
    _in_process = source, settings, Decoder()
    parent = multiprocessing.parent_process()
    if parent is not None:  # a killed writer must not leave them waiting
        threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()


def _leave_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _make(indices: range) -> list[tuple[Record, bytes]]:
    source, settings, decoder = _in_process
    made = []
    for index in indices:
        try:
            how, mode, width, height, content = encode(source, index, settings, decoder)
        except UnreadableImage:
            how, mode, width, height, content = BAD, 0, 0, 0, b""
        record = Record(
            how,
            mode,
            width,
            height,
            length=len(content),
            label=source.label(index),
            crc=zlib.crc32(content),
        )
        made.append((record, content))
    return made


def _made(
    source: Source, settings: Settings, num_workers: int, first: int, end: int, done: int
) -> Iterator[tuple[Record, bytes]]:
    """The entry and the bytes of every image, in order."""
    jobs = [range(start, min(start + _CHUNK, end)) for start in range(first, end, _CHUNK)]
    chunks = (
        _by_processes(source, settings, num_workers, jobs)
        if num_workers > 1 and len(jobs) > 1
        else _here(source, settings, jobs)
    )
    try:
        yield from progress_report.report(
            (image for chunk in chunks for image in chunk), end - first + done, "wrote", done
        )
    finally:
        chunks.close()


def _here(source: Source, settings: Settings, jobs: list[range]) -> Made:
    _start(source, settings)
    try:
        yield from map(_make, jobs)
    finally:
        _in_process[2].close()


def _by_processes(source: Source, settings: Settings, num_workers: int, jobs: list[range]) -> Made:
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(num_workers, context, _start, (source, settings))
    waiting: deque[Future] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_make, job))
            if len(waiting) > 4 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process was killed; if that was for memory, give fewer --workers; the same write again goes on"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# The file, its journal, and the manifest.


def _finished(path: Path, identity: str) -> dict[str, Any] | None:
    """The manifest of a file that the same write finished earlier; None if there is something left to do.

    A manifest of an earlier version has no hash of its file, so there a journal says that the write was stopped.
    """
    journal = path.with_name(f"{path.name}.journal")
    try:
        manifest = beton_file.manifest_of(path)
        if (
            not path.exists()
            or manifest.get("written") != identity
            or ("table_sha256" not in manifest and journal.exists())
        ):
            return None
        if manifest.get("table_sha256", "") not in ("", beton_file.table_sha256(path)):
            return None
    except ValueError:  # one of them is damaged, or no .beton
        return None
    journal.unlink(missing_ok=True)  # the last thing that a write does
    return manifest


def _opened(journal: Path) -> BinaryIO:
    return journal.open("r+b" if journal.exists() else "w+b")


def _resumed(journal: BinaryIO, data: BinaryIO, identity: str, start: int) -> list[Record]:
    """The entries whose bytes are in `data`; both files end after the last of them."""
    line = f"{identity}\n".encode()
    found = journal.read()
    if not found.startswith(line):  # a new file, or one of another source or settings
        journal.seek(0)
        journal.truncate()
        journal.write(line)
        journal.flush()
        data.truncate(0)
        return []
    whole = (len(found) - len(line)) // _RECORD.itemsize
    records = [
        Record(*entry) for entry in np.frombuffer(found, _RECORD, whole, offset=len(line)).tolist()
    ]
    for number in range(max(0, whole - _VERIFIED), whole):
        record = records[number]
        data.seek(record.place)
        if zlib.crc32(data.read(record.length)) != record.crc:
            records = records[:number]
            break
    journal.seek(len(line) + len(records) * _RECORD.itemsize)
    journal.truncate()
    data.truncate(_end_of(records, start))
    return records


def _append(
    records: list[Record],
    record: Record,
    content: bytes,
    data: BinaryIO,
    journal: BinaryIO,
    page_size: int,
    start: int,
) -> None:
    if len(content) > page_size:
        raise ValueError(
            f"an image of {len(content):,} bytes does not fit into a page of {page_size:,}; give --max-side, or a larger --page-size"
        )
    place = _end_of(records, start)
    if place % page_size + len(content) > page_size:
        place += page_size - place % page_size
    record = record._replace(place=place)
    if content:
        data.seek(place)
        data.write(content)
        data.flush()  # before its entry: what the journal names is there
    journal.write(np.array([record], _RECORD).tobytes())
    journal.flush()
    records.append(record)
    if place // _SYNC_BYTES != (place + len(content)) // _SYNC_BYTES:
        os.fsync(data.fileno())
        os.fsync(journal.fileno())


def _end_of(records: list[Record], start: int) -> int:
    return records[-1].place + records[-1].length if records else start


def _finish(data: BinaryIO, records: np.ndarray, page_size: int) -> None:
    good = records[records["how"] != BAD]
    if not len(good):
        raise ValueError("no image of the source can be read; nothing was written")
    samples = np.zeros(len(good), beton_file.SAMPLE)
    samples["image"], samples["label"] = good[list(IMAGE.names or ())].astype(IMAGE), good["label"]
    beton_file.finish(data, samples, good["length"], page_size)


def _manifest(
    source: Source, settings: Settings, records: np.ndarray, first: int
) -> dict[str, Any]:
    """Nothing in it depends on when or by how many processes the file was written."""
    bad = (np.flatnonzero(records["how"] == BAD) + first).tolist()
    good = np.flatnonzero(records["how"] != BAD) + first
    whole = len(good) == len(source)
    counts = {
        name: int((records["how"] == how).sum())
        for name, how in (("kept", KEPT), ("encoded", ENCODED), ("raw", STORED_RAW))
    }
    crcs = records["crc"][records["how"] != BAD]
    return {
        "num_samples": len(good),
        **counts,
        "bad": [_reason(source, index, settings) for index in bad],
        "classes": source.classes,
        "fingerprint": source.fingerprint if whole else source.take(good).fingerprint,
        "source": source.fingerprint,
        "first": first,
        **asdict(settings),
        "crc32": zlib.crc32(np.ascontiguousarray(crcs).tobytes()),
    }


def _reason(source: Source, index: int, settings: Settings) -> str:
    decoder = Decoder()
    try:
        encode(source, index, settings, decoder)
    except UnreadableImage as error:
        return str(error)
    finally:
        decoder.close()
    return f"{source.name(index)}: was unreadable when it was written, and is not now"


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
