"""The archives of CIFAR-10, CIFAR-100 and STL-10 as their authors publish them, or unpacked."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TAR_SUFFIXES = (".tar.gz", ".tgz", ".tar")
CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


@dataclass(frozen=True)
class Archive:
    """The published files of a data set.

    Attributes:
        folder: Folder of the files, inside the archive or unpacked.
        tar_name: Name of the archive without its suffix.
        members: Names of the files that are read.
        identifying: Names of files that no other data set has together.
        torchvision_class: Class of torchvision that knows where to download the archive.
    """

    folder: str
    tar_name: str
    members: tuple[str, ...]
    identifying: tuple[str, ...]
    torchvision_class: str


ARCHIVES = {
    "cifar10": Archive(
        folder="cifar-10-batches-py",
        tar_name="cifar-10-python",
        members=(*CIFAR10_BATCHES, "test_batch", "batches.meta"),
        identifying=("data_batch_1", "batches.meta"),
        torchvision_class="CIFAR10",
    ),
    "cifar100": Archive(
        folder="cifar-100-python",
        tar_name="cifar-100-python",
        members=("train", "test", "meta"),
        identifying=("train", "test", "meta"),
        torchvision_class="CIFAR100",
    ),
    "stl10": Archive(
        folder="stl10_binary",
        tar_name="stl10_binary",
        members=(
            *("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"),
            *("unlabeled_X.bin", "class_names.txt"),
        ),
        identifying=("train_X.bin",),
        torchvision_class="STL10",
    ),
}


def find_archive(root: Path, source: str) -> tuple[str, Path] | None:
    """Return the name of a published data set, and its archive or its folder of files.

    Args:
        root: The archive, the folder of its files, or the folder that contains that folder.
        source: The setting `data.source`. If it names a data set, an archive may have any name.
    """
    for name, archive in ARCHIVES.items():
        for folder in (root, root / archive.folder):
            if all((folder / member).is_file() for member in archive.identifying):
                return name, folder
        is_tar = root.name.lower().endswith(TAR_SUFFIXES) and root.is_file()
        if is_tar and (source == name or root.name.startswith(archive.tar_name)):
            return name, root
    return None


def stamp_file(path: Path, name: str) -> Path:
    """Return the file whose date and size stand for the archive or folder."""
    return path / ARCHIVES[name].identifying[0] if path.is_dir() else path


def read_members(path: Path, name: str) -> Iterator[tuple[str, IO[bytes], int]]:
    """Yield the name, the content as a stream and the size of each file, in the archive's order.

    Args:
        path: The archive or the folder of its files.
        name: Name of the data set.
    """
    members = ARCHIVES[name].members
    if path.is_dir():
        for member in members:
            if (path / member).is_file():
                with (path / member).open("rb") as file:
                    yield member, file, (path / member).stat().st_size
        return
    with tarfile.open(path) as archive:
        for info in archive:
            stream = archive.extractfile(info) if info.isfile() else None
            if stream is not None and Path(info.name).name in members:
                yield Path(info.name).name, stream, info.size


def download(name: str, cache_dir: Path) -> Path:
    """Return the archive in the cache folder, which is downloaded if it is absent.

    Raises:
        ValueError: If it cannot be downloaded.
    """
    from torchvision import datasets  # slow to import
    from torchvision.datasets.utils import download_url

    published = getattr(datasets, ARCHIVES[name].torchvision_class)
    try:
        download_url(published.url, cache_dir, published.filename, published.tgz_md5)
    except Exception as error:  # urllib and torchvision raise many kinds of errors
        raise ValueError(
            f"data.root: {published.filename} cannot be downloaded ({error}); without a network, "
            "set data.root to the archive or to its unpacked folder"
        ) from error
    return cache_dir / str(published.filename)
