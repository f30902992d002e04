"""Read and write the manifest of a checkpoint, and verify the files that it lists.

The manifest is a JSON file that lists the size and SHA-256 of every other file and ends with a
SHA-256 of its own text. Manifests of format 1 end without that hash. They can still be read, and
all other checks apply to them.
"""

import functools
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain import schema
from ssl_pretrain.distributed import process_group
from ssl_pretrain.system import durable_files
from ssl_pretrain.system.import_path import PACKAGE

FORMAT = 2
READABLE_FORMATS = (1, FORMAT)
MANIFEST_FILE = "manifest.json"
HASH_KEY = "manifest_sha256"  # key of the last entry, which hashes the text before it
METHOD_FILE = "method.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SHARD_PREFIX = "shard-"
TYPE_NAMES = {int: "a number", dict: "an object", str: "a string"}
REQUIRED_TYPES = {
    "step": int,
    "files": dict,
    "config": dict,
    "machine": dict,
    "versions": dict,
    "evaluated": str,
    "network": str,
}
MAIN_PACKAGES = ("ssl_pretrain", "torch", "torchvision", "timm", "numpy")


def describe_machine() -> dict[str, Any]:
    """Describe the ranks, threads, torch and processors, on which the bits of a result depend."""
    machine = {
        "world_size": process_group.world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cudnn"] = torch.backends.cudnn.version()
    return machine


def list_versions() -> dict[str, str]:
    """Return the versions of Python and the main packages, and the revision of this code."""
    packages = {package: _version(package) for package in MAIN_PACKAGES}
    return {"python": platform.python_version(), **packages, "revision": _revision()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check a checkpoint's manifest, but not the files that it lists.

    Raises:
        ValueError: If the manifest is damaged, belongs to another folder, or has a format that this
            version cannot read.
    """
    manifest = _read(path)
    if manifest.get("format") not in READABLE_FORMATS:
        versions = manifest["versions"]
        raise ValueError(
            f"{path} has checkpoint format {manifest.get('format')!r}; this version reads format "
            f"{FORMAT}. The checkpoint was written by ssl_pretrain {versions.get('ssl_pretrain')} "
            f"({versions.get('revision')}). Use that version, or start a new run"
        )
    return manifest


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check the size and SHA-256 of every file of a checkpoint, and return its manifest.

    The format is not checked, so a checkpoint can be intact and too new for this version to read.

    Raises:
        ValueError: If a file is missing, truncated, changed or unreadable. The message names the
            file.
    """
    manifest = _read(path)
    for name, entry in manifest["files"].items():
        file, label = path / name, f"{path.name}/{name}"
        try:
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{label} is truncated: {size} bytes of {entry['bytes']}")
            if durable_files.sha256(file) != entry["sha256"]:
                raise ValueError(f"{label} is damaged: its SHA-256 differs from the manifest")
        except FileNotFoundError:
            raise ValueError(f"{label} is missing") from None
        except OSError as error:
            raise ValueError(
                f"{label} cannot be read: {durable_files.describe_error(error)}"
            ) from None
    return manifest


def to_json(manifest: dict[str, Any]) -> str:
    """Format a manifest as JSON that ends with the SHA-256 of the text before it."""
    entries = {key: value for key, value in manifest.items() if key != HASH_KEY}
    body = json.dumps(entries, indent=1).removesuffix("\n}")
    return body + _hash_line(body)


def describe_files(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return the manifest's entry for each file, with the size in bytes and the SHA-256."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": durable_files.sha256(path)}
        for path in paths
    }


def _read(path: Path) -> dict[str, Any]:
    name = f"{path.name}/{MANIFEST_FILE}"
    try:
        text = (path / MANIFEST_FILE).read_bytes().decode()
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__})") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{name} cannot be read: it is not a JSON object")
    if not _hash_matches(text) and not _may_lack_hash(manifest, text):
        raise ValueError(f"{name} is damaged: its SHA-256 does not match")
    problem = _describe_wrong_entry(manifest) or _describe_wrong_folder(path, manifest)
    if problem:
        raise ValueError(f"{name} cannot be read: {problem}")
    return _with_current_names(manifest) | {"machine": _with_current_names(manifest["machine"])}


def _with_current_names(entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries with old names replaced by their current names."""
    return {schema.RENAMED_KEYS.get(key, key): value for key, value in entries.items()}


def _hash_line(body: str) -> str:
    return f',\n "{HASH_KEY}": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}'


def _hash_matches(text: str) -> bool:
    body, comma, end = text.rpartition(",\n")
    return comma + end == _hash_line(body)


def _may_lack_hash(manifest: dict[str, Any], text: str) -> bool:
    """Return True for format 1, and for an unknown format whose text has no hash line.

    One flipped bit cannot turn a manifest of the current format into either of these. The digits 1
    and 2 differ in two bits, and the hash line remains after any flip in the format.
    """
    if manifest.get("format") == 1:
        return HASH_KEY not in manifest
    return manifest.get("format") not in READABLE_FORMATS and f',\n "{HASH_KEY}": "' not in text


def _describe_wrong_entry(manifest: dict[str, Any]) -> str | None:
    """Describe the first entry that is missing or has the wrong type, or return None."""
    for key, required_type in REQUIRED_TYPES.items():
        if not isinstance(manifest.get(key), required_type) or isinstance(manifest[key], bool):
            return f"{key} is missing or is not {TYPE_NAMES[required_type]}"
    names = manifest["files"].keys()
    for name, entry in manifest["files"].items():
        if not name or Path(name).name != name or name == MANIFEST_FILE:
            return f"files: {name!r} is not a file name in the checkpoint's folder"
        size, digest = (
            (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (0, 0)
        )
        if not isinstance(size, int) or not isinstance(digest, str):
            return f"files: {name!r} has no valid bytes or sha256 entry"
    is_sharded = any(name.startswith(SHARD_PREFIX) for name in names)
    if not is_sharded and not {METHOD_FILE, OPTIMIZER_FILE} <= names:
        return f"files: needs {METHOD_FILE} and {OPTIMIZER_FILE}, or a {SHARD_PREFIX}* file"
    return None


def _describe_wrong_folder(path: Path, manifest: dict[str, Any]) -> str | None:
    """Describe a mismatch between the manifest and its folder, or return None."""
    step = path.name.removeprefix("step_")
    if step != path.name and step.isdecimal() and int(step) != manifest["step"]:
        return f"it belongs to the checkpoint of step {manifest['step']}"
    tensor_files = {file.name for file in path.glob("*.safetensors")}
    unlisted = sorted(tensor_files - manifest["files"].keys())
    return f"files: {unlisted[0]} is in the folder but not in the manifest" if unlisted else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name"))
        return model.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def _revision() -> str:
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
