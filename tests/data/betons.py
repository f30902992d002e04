"""Small .beton files for tests: JPEGs of many sizes, with labels, written by the project's own writer."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pretrain.data.beton import writer as beton_writer
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.encoder import Settings
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.sources import DataConfig, open_source

try:
    decode.library()
    missing = ""
except ValueError as error:
    missing = str(error)
needs_ffcv = pytest.mark.skipif(bool(missing), reason=missing or "FFCV is here")


def jpeg(number: int, width: int, height: int, **options) -> bytes:
    """A smooth picture of its own for each number: noise would not survive a JPEG."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90, **options
    )
    return file.getvalue()


def tree(root: Path, n: int = 50, classes: int = 3) -> Path:
    """root/train/class_k/NNN.jpg; sizes from 20 x 20 to 120 x 90, so that crops shrink and grow."""
    generator = np.random.default_rng(7)
    for number in range(n):
        folder = root / "train" / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = int(generator.integers(20, 120)), int(generator.integers(20, 90))
        (folder / f"{number:04d}.jpg").write_bytes(jpeg(number, width, height))
    return root


def opened(root: Path, **options) -> Source:
    return open_source(
        DataConfig(root=str(root), cache_dir=str(root.parent / "lists"), **options), "train"
    )


def written(root: Path, n: int = 50, **settings) -> Beton:
    """The tree of `root`, and beside it the same as train.beton."""
    source = opened(tree(root, n), loader="folder")
    beton_writer.write(source, root.parent / "train.beton", Settings(**settings), num_workers=1)
    stored = opened(root.parent / "train.beton")
    assert isinstance(stored, Beton)
    return stored
