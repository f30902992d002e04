"""Check a .beton by decoding every image and comparing checksums with the manifest."""

import contextlib
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ssl_pretrain.data.beton.beton_file import Samples
from ssl_pretrain.data.beton.beton_manifest import manifest_path, read_manifest
from ssl_pretrain.data.messages import report_progress
from ssl_pretrain.data.native import decode

_FAILURE_REASONS = decode.FAILURE_REASONS | {
    decode.TRUNCATED: "the file ends within the image, or cannot be read"
}


def find_problems(samples: Samples, num_threads: int = 1) -> list[str]:
    """Return one line per problem, for the images and for the manifest of each file."""
    statuses, crcs = np.array(_decode_all(samples, num_threads), np.int64).T
    problems = [
        f"{samples.name(index)}: {_FAILURE_REASONS[status]}"
        for index, status in enumerate(statuses.tolist())
        if status != decode.DONE
    ]
    for file_index, path in enumerate(map(Path, samples.paths)):
        manifest = read_manifest(path)
        file_crcs = crcs[samples.file_index == file_index].astype(np.uint32)
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


def _decode_all(samples: Samples, num_threads: int) -> list[tuple[int, int]]:
    """Return the decoder's status for each image, and the CRC-32 of its bytes."""
    thread_data, functions = threading.local(), decode.load_c_functions()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb", buffering=0)) for path in samples.paths]
        stored_images = decode.pack_images(samples, [file.fileno() for file in files])

        def decode_one(index: int) -> tuple[int, int]:
            if not hasattr(thread_data, "workspace"):
                decoder = stack.enter_context(decode.Decoder())
                thread_data.workspace = decode.allocate_workspace(samples, [], decoder)
            workspace = thread_data.workspace
            status = decode.decode_image(functions, stored_images, index, workspace)
            return int(status), zlib.crc32(workspace.content[: samples.length[index]])

        with ThreadPoolExecutor(num_threads) as pool:
            results = pool.map(decode_one, range(len(samples)))
            return list(report_progress(results, len(samples), "checked"))
