"""Compare what the vectors of two commands depend on: weights, feature, transform and images."""

import hashlib
import os
from typing import Any

import numpy as np

from ssl_pretrain.data.image_source import ImageFiles, Source

NUM_STAMPED_FILES = 256  # files of a folder whose size and time are part of the fingerprint
# What the vectors depend on, by the name that a message uses.
IDENTITY = {
    "weights_sha256": "weights",
    "feature": "feature",
    "transform": "transform",
    "precision": "precision",
    "dtype": "dtype",
    "count": "number of images",
    "images_fingerprint": "images",
}


def fingerprint(source: Source) -> str:
    """Return a fingerprint of the images that also changes with most changes of their content.

    It has the names, the labels and the order, the size and time of a file that has all images, and
    those of some of the files in a folder.
    """
    digest = hashlib.sha256(source.fingerprint.encode())
    paths = [source.full_path]
    if isinstance(source, ImageFiles) and not len(source.files.spans):
        chosen = np.unique(np.linspace(0, len(source) - 1, NUM_STAMPED_FILES).astype(np.int64))
        paths = [source.name(index) for index in chosen.tolist()]
    for path in paths:
        if os.path.isfile(path):
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def find_difference(saved: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Return which vectors differ, and how, or an empty string if none does."""
    differences = []
    for key, name in IDENTITY.items():
        old, new = saved.get(key), metadata[key]
        if old != new:
            shown_old, shown_new = (
                str(value)[:12] if key.endswith(("sha256", "fingerprint")) else value
                for value in (old, new)
            )
            differences.append(f"{name}: {shown_old} in the file, {shown_new} in this command")
    return "; ".join(differences)
