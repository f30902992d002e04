"""The manifest beside a .beton file, such as `train.beton.json`.

It contains the class names, the numbers of images and the fingerprint of the source. A hash of its
content detects flipped bits. FFCV's own writer does not write a manifest.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ssl_pretrain.system import durable_files

_HASH_KEY = "manifest_sha256"


@dataclass(frozen=True)
class Manifest:
    """Description of a .beton file.

    The values do not depend on when the file was written or by how many processes. If a field's key
    in the JSON differs from its name, the field's metadata has the key.
    """

    # Hash of the source, the settings and the range of images.
    write_id: str = field(metadata={"key": "written"})
    # Hash of the source and the settings, equal in all shards of a set.
    shard_set_id: str = field(metadata={"key": "of_source"})
    num_samples: int
    num_unchanged: int = field(metadata={"key": "kept"})  # images stored with their original bytes
    num_encoded: int = field(metadata={"key": "encoded"})  # images stored as new JPEGs
    num_raw: int = field(metadata={"key": "raw"})  # images stored as pixels
    unreadable_images: list[str] = field(metadata={"key": "bad"})  # one line per image
    classes: list[str]
    fingerprint: str  # fingerprint of the images in the file
    # Fingerprint of the source, including its unreadable images.
    source_fingerprint: str = field(metadata={"key": "source"})
    first_index: int = field(metadata={"key": "first"})  # source index of the file's first image
    max_side: int  # longest side of an image in pixels, or 0 for no limit
    quality: int  # quality of the new JPEGs
    page_size: int  # bytes
    crc32: int  # CRC-32 of the CRC-32 values of all images
    range: list[float] | None = None  # value of `data.range`
    table_sha256: str = ""  # hash of the tables in the file; empty in earlier versions


_FIELDS_BY_KEY = {item.metadata.get("key", item.name): item for item in fields(Manifest)}
_REQUIRED_KEYS = _FIELDS_BY_KEY.keys() - {"range", "table_sha256"}


def manifest_path(path: Path) -> Path:
    """Return the path of the manifest beside a .beton file."""
    return path.with_name(f"{path.name}.json")


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write or replace the manifest beside a .beton file."""
    content = {key: getattr(manifest, item.name) for key, item in _FIELDS_BY_KEY.items()}
    content = {key: value for key, value in content.items() if key != "range" or value}
    text = json.dumps({**content, _HASH_KEY: _hash(content)}, indent=1)
    durable_files.replace(manifest_path(path), text)


def read_manifest(path: Path) -> Manifest | None:
    """Return the manifest beside a .beton file, or None if there is none.

    Raises:
        ValueError: If the manifest is damaged.
    """
    try:
        return _parse(json.loads(manifest_path(path).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):  # a folder, or JSON that is invalid or too deep
        raise ValueError(
            f"data.root: {manifest_path(path)} is damaged; copy it again, or run the same write "
            "command again"
        ) from None


def _parse(content: Any) -> Manifest:
    """Check the keys, the types of their values and the hash, and return the manifest."""
    if not isinstance(content, dict):
        raise ValueError("not a manifest")
    saved_hash = content.pop(_HASH_KEY, None)
    is_earlier_version = saved_hash is None and content.keys() == _REQUIRED_KEYS
    is_intact = saved_hash == _hash(content) and "table_sha256" in content
    has_valid_keys = _REQUIRED_KEYS <= content.keys() <= _FIELDS_BY_KEY.keys()
    if not (is_earlier_version or is_intact) or not has_valid_keys:
        raise ValueError("the hash does not match, or the keys differ")
    if not all(_has_type(content[key], _FIELDS_BY_KEY[key].type) for key in _REQUIRED_KEYS):
        raise ValueError("a value has the wrong type")
    return Manifest(**{_FIELDS_BY_KEY[key].name: value for key, value in content.items()})


def _has_type(value: Any, field_type: Any) -> bool:
    if field_type == list[str]:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return type(value) is field_type


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def merge_manifests(manifests: Sequence[Manifest | None]) -> Manifest | None:
    """Return one manifest for all shards, or None if none of them has one."""
    shards = [manifest for manifest in manifests if manifest is not None]
    if len(shards) < 2:
        return shards[0] if shards else None
    unreadable_images = [line for shard in shards for line in shard.unreadable_images]
    fingerprints = "+".join(shard.fingerprint for shard in shards)
    return replace(
        shards[0],
        num_samples=sum(shard.num_samples for shard in shards),
        num_unchanged=sum(shard.num_unchanged for shard in shards),
        num_encoded=sum(shard.num_encoded for shard in shards),
        num_raw=sum(shard.num_raw for shard in shards),
        unreadable_images=unreadable_images,
        fingerprint=fingerprints if unreadable_images else shards[0].source_fingerprint,
    )
