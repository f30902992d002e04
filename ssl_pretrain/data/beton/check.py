"""Check a .beton by decoding every image and comparing checksums with the manifest."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ssl_pretrain.data.beton.beton_file import Samples
from ssl_pretrain.data.beton.beton_manifest import manifest_path, read_manifest
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.images import UnreadableImage
from ssl_pretrain.data.messages import report_progress


def find_problems(samples: Samples, num_threads: int = 1) -> list[str]:
    """Return one line per problem, for the images and for the manifest of each file."""
    with ThreadPoolExecutor(num_threads) as pool:
        results = pool.map(partial(_check_image, Beton(samples)), range(len(samples)))
        checked = list(report_progress(results, len(samples), "checked"))
    problems = [problem for problem, _ in checked if problem]
    crcs = np.array([crc for _, crc in checked], np.uint32)
    for file_index, path in enumerate(map(Path, samples.paths)):
        manifest = read_manifest(path)
        file_crcs = crcs[samples.file_index == file_index]
        if manifest is None:
            problems.append(
                f"{path}: has no manifest ({manifest_path(path).name}), so there are no class "
                "names and no checksum to compare with"
            )
        elif zlib.crc32(file_crcs.tobytes()) != manifest.crc32:
            problems.append(
                f"{path}: the images have changed since the file was written (their CRC-32 differs "
                "from the manifest's)"
            )
    return problems


def _check_image(source: Beton, index: int) -> tuple[str, int]:
    """Return the problem of one image, or an empty string, and the CRC-32 of its bytes."""
    crc = 0
    try:
        content = source.read_bytes(index)
        crc = zlib.crc32(content)
        source.decode(index, content)
    except UnreadableImage as error:
        return str(error), crc
    return "", crc
