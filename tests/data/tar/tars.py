"""Small tar shards for tests, made by tarfile or by our own writer."""

import io
import tarfile
from pathlib import Path

from betons import encode_jpeg, write_images
from loaders import build_loader, digest, digests

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.sources import DataConfig, open_source
from ssl_pretrain.data.tar.tar_source import TarShards
from ssl_pretrain.data.tar.tar_writer import ShardSize, write_shards
from ssl_pretrain.views.recipe import Crop, ViewsConfig

VIEWS = ViewsConfig(
    crops={"global": Crop(count=2, size=16, jitter=0.8, hue=0.1), "local": Crop(count=1, size=8)}
)
JPEG = encode_jpeg(1, 20, 16)
Members = list[tuple[str, bytes]]


def make_tar(path: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write a tar with these members, which have no dates and owners."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def open_shards(root: Path | str, split: str = "train", **options) -> TarShards:
    source = open_source(DataConfig(root=str(root), **options), split)
    assert isinstance(source, TarShards)
    return source


def write_folder_and_shards(
    folder: Path, num_images: int = 50, images_per_shard: int = 12
) -> tuple[Source, Path]:
    """Write images, and shards of the same images. Return the former, and the latter's folder."""
    images = open_source(
        DataConfig(
            root=str(write_images(folder / "images", num_images)), cache_dir=str(folder / "lists")
        ),
        "train",
    )
    list(write_shards(images, folder / "shards", "train", ShardSize(num_images=images_per_shard)))
    return images, folder / "shards"
