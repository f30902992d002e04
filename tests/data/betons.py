"""Small .beton files for tests: labeled JPEGs of many sizes, written by our own writer."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_pretrain.data.beton import beton_writer
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.encoder import EncodingSettings
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.native import ffcv
from ssl_pretrain.data.sources import DataConfig, open_source

try:
    ffcv.load_library()
    problem = ""
except ValueError as error:
    problem = str(error)
needs_ffcv = pytest.mark.skipif(bool(problem), reason=problem or "FFCV is installed")


def encode_jpeg(number: int, width: int, height: int, **options) -> bytes:
    """Encode a smooth picture, seeded by `number`. Noise would not survive JPEG compression."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=90, **options
    )
    return file.getvalue()


def write_images(root: Path, n: int = 50, classes: int = 3) -> Path:
    """Write root/train/class_k/NNNN.jpg of 20x20 to 120x90 pixels, so crops shrink and grow."""
    generator = np.random.default_rng(7)
    for number in range(n):
        folder = root / "train" / f"class_{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        width, height = int(generator.integers(20, 120)), int(generator.integers(20, 90))
        (folder / f"{number:04d}.jpg").write_bytes(encode_jpeg(number, width, height))
    return root


def open_train(root: Path, **options) -> Source:
    return open_source(
        DataConfig(root=str(root), cache_dir=str(root.parent / "lists"), **options), "train"
    )


def write_beton(root: Path, n: int = 50, **settings) -> Beton:
    """Write images into `root`, convert them to train.beton beside it, and open that."""
    source = open_train(write_images(root, n), loader="folder")
    beton_writer.write(
        source, root.parent / "train.beton", EncodingSettings(**settings), num_workers=1
    )
    beton = open_train(root.parent / "train.beton")
    assert isinstance(beton, Beton)
    return beton
