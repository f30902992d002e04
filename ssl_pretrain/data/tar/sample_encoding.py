"""Turn an image of any source into the members of a sample: its file, label, facts and captions."""

import io
import json
import os
from typing import Any

import numpy as np
from PIL import Image

from ssl_pretrain.data import bands
from ssl_pretrain.data.beton.beton_source import Beton
from ssl_pretrain.data.beton.tables import RAW
from ssl_pretrain.data.file_types import is_image
from ssl_pretrain.data.formats.array_source import ArraySource
from ssl_pretrain.data.image_source import EncodedSource, ImageFiles, Source
from ssl_pretrain.data.images import UnreadableImage

_KEY_DIGITS = 9
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}  # others have the format's name


def encode_sample(source: Source, index: int) -> list[tuple[str, bytes]]:
    """Return the names and contents of the members of a sample.

    Raises:
        UnreadableImage: If the image cannot be read.
    """
    suffix, content = _encode_image(source, index)
    key, label = f"{index:0{_KEY_DIGITS}d}", source.label(index)
    members = [(f"{key}{suffix}", content)]
    facts: dict[str, Any] = {}
    if label >= 0:
        members.append((f"{key}.cls", str(label).encode()))
        facts = {"label": label, "class": source.classes[label]}
    if isinstance(source, ImageFiles):
        facts["file"] = source.files.path(index)
    captions = source.texts(index)[0] if source.num_texts == 1 else []
    if len(captions) > 1:
        facts["captions"] = captions
    if facts:
        members.append((f"{key}.json", json.dumps(facts).encode()))
    if len(captions) == 1:
        members.append((f"{key}.txt", captions[0].encode("utf-8", "replace")))
    return members


def _encode_image(source: Source, index: int) -> tuple[str, bytes]:
    """Return the suffix and the bytes of an image.

    Files keep their bytes. Values without a file format become a PNG if they have 8 bits and 1 or 3
    channels, and else a .npy.
    """
    is_raw = isinstance(source, Beton) and source.samples.mode[index] == RAW
    if isinstance(source, EncodedSource) and not is_raw:
        content = source.read_bytes(index)
        if isinstance(source, ImageFiles):
            suffix = os.path.splitext(source.files.path(index))[1].lower()
            if is_image(f"image{suffix}"):
                return suffix, content
        return _suffix_of(content, source.name(index)), content
    file = io.BytesIO()
    values = source.values(index) if isinstance(source, ArraySource) else source.read(index)
    if values.dtype in (np.uint8, np.bool_) and values.shape[2] in (1, 3):
        Image.fromarray(source.read(index)).save(file, "PNG")
        return ".png", file.getvalue()
    np.save(file, np.ascontiguousarray(values), allow_pickle=False)
    return ".npy", file.getvalue()


def _suffix_of(content: bytes, name: str) -> str:
    if bands.is_npy(content):
        return ".npy"
    if content.startswith(bands.TIFF_SIGNATURES):
        return ".tif"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image_format = image.format or ""
    except Exception as error:  # decoders raise almost anything for damaged files
        raise UnreadableImage(f"{name}: {type(error).__name__}: {error}") from error
    return _SUFFIXES.get(image_format, f".{image_format.lower()}")
