"""Compute the vectors of many images in blocks, so that a killed command continues where it was.

Finished blocks are kept in the folder OUT.job. Each is fsynced and renamed, so it is complete or
absent. When all blocks exist, OUT is written atomically and the folder is removed. A job is only
continued with the same images, weights, feature and transform.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssl_pretrain.data.config import DataConfig
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.replacement import ReplacementLimit
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import results
from ssl_pretrain.eval.embedding import embedding_file
from ssl_pretrain.eval.embedding.embedding_writers import Entries
from ssl_pretrain.eval.embedding.feature_batches import FeatureExtractor
from ssl_pretrain.eval.embedding.job_identity import find_difference, fingerprint
from ssl_pretrain.eval.embedding.progress_line import ProgressLine
from ssl_pretrain.fault_tolerance.lock_holder import FolderFlock
from ssl_pretrain.system import durable_files

JOB_FILE = "job.json"
BATCHES_PER_BLOCK = 4
# Ranks wait for the slowest one and for the file as a multiple of the process group's time limit:
# 24 hours for 10 minutes.
TIMEOUT_FACTOR = 144.0
MAX_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class JobOptions:
    """Settings of the computation and of the file.

    Attributes:
        dtype: "float32" or "float16", the type in the file.
        batch_size: Images per forward pass.
        num_workers: Processes that read the images.
        max_replaced: Share of the images that may be unreadable.
        overwrites: Replace an existing file, and discard an unfinished job with other settings.
    """

    dtype: str = "float32"
    batch_size: int = 64
    num_workers: int = 0
    max_replaced: float = DataConfig.max_replaced
    overwrites: bool = False


def embed_to_file(
    extractor: FeatureExtractor,
    source: Source,
    out: Path,
    provenance: dict[str, Any],
    options: JobOptions | None = None,
) -> dict[str, Any]:
    """Write the vectors of images to a file, or continue an earlier command that was stopped.

    Under torchrun each rank computes its share of the blocks.

    Args:
        extractor: Feature to compute.
        source: The images.
        out: File to write.
        provenance: Entries about the network for the file's metadata.
        options: How the vectors are computed and stored.

    Returns:
        The metadata of the file. `unreadable` has the reason for each image that could not be read
        and whose vector is therefore NaN. `not_finite` has the names of the readable images for
        which the network computed a value that is NaN or infinite.

    Raises:
        ValueError: If the file exists with other vectors, an unfinished job has other settings,
            another process writes the file, or too many images are unreadable.
    """
    options = options or JobOptions()
    row_shape = extractor.describe_shape()
    metadata = {
        **provenance,
        "images": source.full_path,
        "images_fingerprint": fingerprint(source),
        "count": len(source),
        "dtype": options.dtype,
    }
    embedding_file.check_names(out, _names(source))
    group = process_group.new_cpu_group(TIMEOUT_FACTOR)
    existing = None
    if not options.overwrites:
        existing = collectives.run_on_main(lambda: _find_complete_file(out, metadata), group)
    if existing is not None:
        return existing
    job = EmbeddingJob(out, metadata, row_shape, options, group)
    with job:
        job.compute(extractor, source)
        collectives.barrier(group)
        return collectives.run_on_main(lambda: job.finish(source), group)


def _find_complete_file(out: Path, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metadata of the file if it has these vectors, or None if there is no file.

    The blocks of a job that was killed after it wrote the file are removed.

    Raises:
        ValueError: If the file has other vectors.
    """
    if not out.exists():
        return None
    existing = embedding_file.read_metadata(out)
    if difference := find_difference(existing, metadata):
        raise ValueError(
            f"OUT: {out} exists with other vectors ({difference}); give another name, or "
            "--overwrite to replace it"
        )
    results.print_progress(f"{out}: is complete, nothing to do")
    flock = FolderFlock(_job_folder(out))
    if flock.try_take():  # otherwise another process may be computing a new file
        shutil.rmtree(flock.folder, ignore_errors=True)
        flock.release()
    return existing


class EmbeddingJob:
    """The folder of finished blocks. Entering it takes its lock.

    Args:
        out: File that the job writes in the end.
        metadata: What the vectors depend on, and more entries for the file.
        row_shape: Shape of the vectors of one image.
        options: How the vectors are computed and stored.
        group: Process group on which the ranks wait for each other, or None for the usual one.
    """

    def __init__(
        self,
        out: Path,
        metadata: dict[str, Any],
        row_shape: tuple[int, ...],
        options: JobOptions,
        group: Any = None,
    ):
        self.out, self.folder = out, _job_folder(out)
        self.metadata, self.row_shape, self.options = metadata, row_shape, options
        self.block_images = BATCHES_PER_BLOCK * options.batch_size
        self._flock, self._group = FolderFlock(self.folder), group

    def __enter__(self) -> "EmbeddingJob":
        try:
            collectives.run_on_main(self._open, self._group)
        except BaseException:
            self._flock.release()
            raise
        saved = json.loads((self.folder / JOB_FILE).read_text(encoding="utf-8"))
        self.metadata, self.block_images = saved["metadata"], saved["block_images"]
        return self

    def __exit__(self, *_exception: object) -> None:
        self._flock.release()

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all images."""
        return -(-self.metadata["count"] // self.block_images)

    def compute(self, extractor: FeatureExtractor, source: Source) -> None:
        """Compute this rank's share of the blocks that are not there yet."""
        # All ranks share one list. A late rank would already find blocks of the others.
        missing = collectives.run_on_main(
            lambda: [block for block in range(self.num_blocks) if not self._is_finished(block)],
            self._group,
        )
        num_done = len(source) - sum(len(self._indices(block)) for block in missing)
        if num_done:
            results.print_progress(
                f"{self.folder}: continues after {num_done:,} of {len(source):,} images"
            )
        own = missing[process_group.rank() :: process_group.world_size()]
        if not own:
            return
        indices = np.concatenate([self._indices(block) for block in own])
        rows: list[np.ndarray] = []
        unreadable: dict[int, str] = {}
        with ProgressLine(num_done + len(indices), num_done) as progress:
            for batch in extractor.extract(
                source,
                indices,
                batch_size=self.options.batch_size,
                num_workers=self.options.num_workers,
                limit=ReplacementLimit(source, len(source), self.options.max_replaced),
            ):
                rows.append(batch.features.numpy())
                unreadable |= batch.unreadable
                while own and sum(map(len, rows)) >= len(self._indices(own[0])):
                    values, length = np.concatenate(rows), len(self._indices(own[0]))
                    self._write_block(own.pop(0), values[:length], unreadable, source)
                    rows = [values[length:]]
                if process_group.is_main():
                    progress.add(len(batch.features))

    def finish(self, source: Source) -> dict[str, Any]:
        """Write the file from the blocks, remove the folder, and return the file's metadata.

        Raises:
            ValueError: If too many images of all blocks together are unreadable. The blocks remain.
        """
        names = list(_names(source))
        unreadable: dict[str, str] = {}
        not_finite: list[str] = []
        for block in range(self.num_blocks):
            with np.load(self._path(block)) as file:
                saved = json.loads(str(file["unreadable"]))
                rows = file.get("not_finite", ())
                not_finite += [names[index] for index in self._indices(block)[list(rows)]]
            unreadable |= {names[int(index)]: reason for index, reason in saved.items()}
        limit = ReplacementLimit(source, len(source), self.options.max_replaced)
        limit.check(len(unreadable), next(reversed(unreadable.values()), ""))
        metadata = self.metadata | {"unreadable": unreadable, "not_finite": not_finite}
        entries = Entries(names, source.labels, [*map(encodable, source.classes)], metadata)
        dtype = np.dtype(self.options.dtype)
        embedding_file.write(self.out, self._read_blocks, self.row_shape, dtype, entries)
        shutil.rmtree(self.folder, ignore_errors=True)
        return metadata

    def _open(self) -> None:
        """Create the folder, or check that it belongs to the same vectors."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._flock.try_take() and self._flock.is_held_by_other:
            raise ValueError(
                f"OUT: another process is writing {self.out}; wait until it ends, or give another "
                "name"
            )
        file = self.folder / JOB_FILE
        if file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))["metadata"]
            difference = find_difference(saved, self.metadata)
            if not difference:
                return
            if not self.options.overwrites:
                raise ValueError(
                    f"{self.folder}: is an unfinished job with other vectors ({difference}); give "
                    "what it was started with, another OUT, or --overwrite to start again"
                )
            for path in self.folder.iterdir():
                path.unlink()
        content = {"metadata": self.metadata, "block_images": self.block_images}
        durable_files.replace(file, f"{json.dumps(content, indent=1)}\n")
        durable_files.sync_folder(self.folder.parent)

    def _indices(self, block: int) -> np.ndarray:
        """Return the indices of the images of a block."""
        start = block * self.block_images
        return np.arange(start, min(start + self.block_images, self.metadata["count"]))

    def _path(self, block: int) -> Path:
        return self.folder / f"block_{block:06d}.npz"

    def _is_finished(self, block: int) -> bool:
        return self._path(block).is_file()

    def _write_block(
        self, block: int, values: np.ndarray, unreadable: dict[int, str], source: Source
    ) -> None:
        indices = self._indices(block)
        if self.options.dtype == "float16":
            too_large = np.abs(np.nan_to_num(values)) > MAX_FLOAT16
            if too_large.any():
                row = int(np.argwhere(too_large)[0][0])
                raise ValueError(
                    f"--dtype float16: {source.name(int(indices[row]))} has a feature of "
                    f"{np.nanmax(np.abs(values[row])):.3g}, more than {MAX_FLOAT16:g}; give "
                    "--dtype float32"
                )
        own = {str(index): unreadable[index] for index in indices.tolist() if index in unreadable}
        is_finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        not_finite = np.flatnonzero(~is_finite & [index not in unreadable for index in indices])

        def write(file: BinaryIO) -> None:
            np.savez(
                file,
                features=values.astype(self.options.dtype),
                unreadable=np.array(json.dumps(own)),
                not_finite=not_finite,
            )

        durable_files.replace_by_writing(self._path(block), write)

    def _read_blocks(self) -> Iterator[np.ndarray]:
        for block in range(self.num_blocks):
            with np.load(self._path(block)) as file:
                yield file["features"]


def encodable(name: str) -> str:
    r"""Return a name in which bytes that are no UTF-8 are written as \x.., as tables need it."""
    return name.encode("utf-8", "backslashreplace").decode()


def _names(source: Source) -> Iterator[str]:
    return (encodable(source.name(index)) for index in range(len(source)))


def _job_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.job")
