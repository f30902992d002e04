"""Check a .beton by decoding every image and comparing checksums with the manifest."""

import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_pretrain.data.beton.beton_manifest import manifest_path, read_manifest
from ssl_pretrain.data.beton.file import Samples
from ssl_pretrain.data.native import decode
from ssl_pretrain.data.progress_report import report_progress

_REASONS = decode.REASONS | {decode.CUT: "the file ends before the image does, or cannot be read"}


def find_problems(samples: Samples, num_threads: int = 1) -> list[str]:
    """Return everything that is wrong with the stored images, one line per problem."""
    results = _decode_all(samples, num_threads)
    problems = [
        f"{samples.name(index)}: {_REASONS[outcome]}"
        for index, (outcome, _) in enumerate(results)
        if outcome != decode.DONE
    ]
    crcs = np.array([crc for _, crc in results], np.uint32)
    for number, path in enumerate(map(Path, samples.paths)):
        manifest = read_manifest(path)
        if manifest is None:
            problems.append(
                f"{path}: has no manifest ({manifest_path(path).name}), so there are no class "
                "names and no checksum to compare with"
            )
        elif zlib.crc32(crcs[samples.file == number].tobytes()) != manifest.crc32:
            problems.append(
                f"{path}: its images changed since it was written (the manifest's crc32 differs)"
            )
    return problems


def _decode_all(samples: Samples, num_threads: int) -> list[tuple[int, int]]:
    """Return the outcome of decoding each image, and the CRC-32 of its bytes."""
    local = threading.local()
    decoders: list[decode.Decoder] = []
    functions = decode.functions(decode.library())
    handles = [os.open(path, os.O_RDONLY) for path in samples.paths]
    stored = decode.pack_stored(samples, handles)

    def decode_one(index: int) -> tuple[int, int]:
        if not hasattr(local, "decoder"):
            local.decoder, local.scratch = decode.Decoder(), decode.allocate_scratch(samples, [])
            decoders.append(local.decoder)
        outcome = decode.decode(functions, stored, index, local.decoder.handle, local.scratch)
        return int(outcome), zlib.crc32(local.scratch.compressed[: samples.length[index]])

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            outcomes = pool.map(decode_one, range(len(samples)))
            return list(report_progress(outcomes, len(samples), "checked"))
    finally:
        for decoder in decoders:
            decoder.close()
        for handle in handles:
            os.close(handle)
