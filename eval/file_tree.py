"""The files of a folder or a zip, which are read on demand and in any process."""

import os
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from ssl_pretrain.data.file_types import is_array, is_picture, is_skipped


class FileTree:
    """The files of a folder or a zip, by their paths relative to it.

    Hidden files and system files, such as those in __MACOSX, are left out. Links to folders are
    followed.

    Raises:
        ValueError: If the path is neither a folder nor a zip.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        paths: Iterable[str]
        if self.root.is_dir():
            paths = _paths_below(self.root)
        elif zipfile.is_zipfile(self.root):
            with zipfile.ZipFile(self.root) as archive:
                paths = [path for path in archive.namelist() if not path.endswith("/")]
        else:
            raise ValueError(f"{root}: neither a folder nor a zip; give one that has the images")
        self.paths = sorted(path for path in paths if not any(map(is_skipped, path.split("/"))))

    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            OSError, KeyError, zipfile.BadZipFile: If the file is missing or damaged.
        """
        return read_file(self.root, path)

    def read_text(self, path: str) -> str:
        """Return the content of a text file.

        Raises:
            ValueError: If it is missing, damaged or not UTF-8.
        """
        try:
            return self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{self.root}: {path} is not UTF-8 text; save it as UTF-8") from None
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.root}: {path} cannot be read ({error}); replace the file"
            ) from None

    def images_below(self, folder: str) -> dict[str, str]:
        """Return the paths of the images in a folder by their paths in it without a suffix.

        A .npy is an image where there are no images in other formats.

        Raises:
            ValueError: If two images differ only in their suffix.
        """
        inside = [path for path in self.paths if path.startswith(folder)]
        images: dict[str, str] = {}
        for path in list(filter(is_picture, inside)) or filter(is_array, inside):
            name = str(PurePosixPath(path.removeprefix(folder)).with_suffix(""))
            if name in images:
                raise ValueError(
                    f"{self.root}: {images[name]} and {path} differ only in their suffix, so "
                    "images and their annotations cannot be paired; remove or rename one"
                )
            images[name] = path
        return images


def read_file(root: Path, path: str) -> bytes:
    """Return the content of a file in a folder or a zip.

    Raises:
        OSError, KeyError, zipfile.BadZipFile: If the file is missing or damaged.
    """
    if root.is_dir():
        return (root / path).read_bytes()
    return _open_zip(root, os.getpid()).read(path)


@lru_cache(maxsize=16)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """Open a zip once per process. A forked process would share the position in the file."""
    return zipfile.ZipFile(path)


def _paths_below(folder: Path) -> Iterator[str]:
    for path, _, names in os.walk(folder, followlinks=True):
        for name in names:
            yield (Path(path) / name).relative_to(folder).as_posix()
