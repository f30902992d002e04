"""Census of JPEG decoders: how many images each pair decodes to identical bits.

    PYTHONPATH=. python tests/bench/decoders.py

The images are the 600 of imagenet_sample.zip, or those of --archive. The decoders are Pillow,
torchvision, simplejpeg and, if FFCV is installed, the libturbojpeg in its library. Each has a copy
of libjpeg-turbo of its own, so equality holds for these versions and these images only.
"""

import argparse
import ctypes
import io
import itertools
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import simplejpeg
import torch
import torchvision
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_jpeg

sys.path[:0] = [str(Path(__file__).parent)]

from measure import DATA_FOLDER, versions

from ssl_pretrain.data.native import ffcv

Decoder = Callable[[bytes], np.ndarray]  # returns the RGB pixels, uint8 (height, width, 3)
VERSION_TEXT = re.compile(rb"libjpeg-turbo version ([0-9.]+)")


def decode_with_pillow(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def decode_with_torchvision(content: bytes) -> np.ndarray:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def decode_with_ffcv(content: bytes) -> np.ndarray:
    """Decode with the functions that `data.loader=ffcv` calls."""
    library = ffcv.load_library()
    height, width = simplejpeg.decode_jpeg_header(content)[:2]
    pixels = np.empty((height, width, 3), np.uint8)
    with ffcv.Decoder() as decoder:
        status = library.tjDecompress2(
            ctypes.c_void_p(decoder.address),
            content,
            ctypes.c_ulong(len(content)),
            ctypes.c_void_p(pixels.ctypes.data),
            width,
            0,
            height,
            0,
            0,
        )
    assert status == 0, "libturbojpeg did not decode an image"
    return pixels


def build_decoders() -> dict[str, Decoder]:
    decoders: dict[str, Decoder] = {
        "pillow": decode_with_pillow,
        "torchvision": decode_with_torchvision,
        "simplejpeg": simplejpeg.decode_jpeg,
    }
    try:
        ffcv.load_library()
    except ValueError as error:
        print(error)
    else:
        decoders["ffcv"] = decode_with_ffcv
    return decoders


def find_library(package: ModuleType, pattern: str) -> list[Path]:
    """Return the libraries of a wheel that match a pattern, also those bundled beside it."""
    folder = Path(str(package.__file__)).parent
    return [*folder.glob(pattern), *folder.with_name(f"{folder.name}.libs").glob(pattern)]


def find_loaded_library(name: str) -> list[Path]:
    """Return the paths of the libraries of this process whose name begins with `name`."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if len(line.split(maxsplit=5)) > 5}
    return sorted(path for path in paths if path.name.startswith(name))


def read_turbo_version(paths: list[Path]) -> str:
    """Return the version of libjpeg-turbo that a library contains as text."""
    for path in paths:
        if match := VERSION_TEXT.search(path.read_bytes()):
            return match[1].decode()
    return "unknown"


def turbo_versions() -> dict[str, str]:
    """Return the version of libjpeg-turbo of each decoder. Only Pillow has a function for it."""
    return {
        "pillow": features.version("libjpeg_turbo") or "unknown",
        "torchvision": read_turbo_version(find_library(torchvision, "libjpeg*")),
        "simplejpeg": read_turbo_version(find_library(simplejpeg, "_jpeg*.so")),
        "ffcv": read_turbo_version(find_loaded_library("libturbojpeg")),
    }


def compare(
    archive: Path, decoders: dict[str, Decoder]
) -> tuple[int, dict[str, int], dict[str, int]]:
    """Return the number of images, and per pair the identical ones and the largest difference."""
    pairs = list(itertools.combinations(decoders, 2))
    num_identical = dict.fromkeys(map("_".join, pairs), 0)
    largest = dict.fromkeys(num_identical, 0)
    num_images = 0
    with zipfile.ZipFile(archive) as images:
        for name in images.namelist():
            if not name.lower().endswith((".jpg", ".jpeg")):
                continue
            content = images.read(name)
            pixels = {decoder: decode(content) for decoder, decode in decoders.items()}
            num_images += 1
            for first, second in pairs:
                difference = np.abs(pixels[first].astype(np.int16) - pixels[second])
                num_identical[f"{first}_{second}"] += not difference.any()
                largest[f"{first}_{second}"] = max(
                    largest[f"{first}_{second}"], int(difference.max())
                )
    return num_images, num_identical, largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archive", type=Path, default=DATA_FOLDER / "imagenet_sample.zip")
    args = parser.parse_args()
    decoders = build_decoders()
    print(versions("torchvision", "pillow", "simplejpeg"))
    turbo = turbo_versions()
    print("libjpeg-turbo: " + ", ".join(f"{name} {turbo[name]}" for name in decoders))
    num_images, num_identical, largest = compare(args.archive, decoders)
    print(f"{num_images} images")
    for pair, count in num_identical.items():
        names = pair.replace("_", " and ")
        print(f"  {names:<26} {count} identical, largest difference {largest[pair]} gray levels")
    texts = [f"{pair}_identical={count / num_images:.3f}" for pair, count in num_identical.items()]
    print(f"ratios: {' '.join(texts)} largest_difference={max(largest.values())}")


if __name__ == "__main__":
    main()
