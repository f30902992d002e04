"""Refuse to train unless all ranks have the same settings, code, versions, data and checkpoints.

Each machine of a run has its own command line and its own copy of the code and the data. Without
this check, ranks that differ in any of them would train together and nobody would notice.
"""

import hashlib
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_pretrain import schema
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.checkpoint.manifest import MANIFEST_FILE, list_versions
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system.import_path import PACKAGE

# Keys and sections that may differ between machines without changing the result.
PER_MACHINE_KEYS = ("data.root", "data.cache_dir", "data.num_workers")
PER_MACHINE_SECTIONS = ("launch", "plan")
IGNORED_FOLDERS = {"eval", "launch"}  # code that training does not use
MAX_DIFFERENCES = 4  # largest number of differences in one message
MOUNT_PATIENCE_SECONDS = 90.0  # longest wait for another machine's files on a network file system
RETRY_SECONDS = 2.0


def check_settings_and_code(values: dict[str, Any], method_module: str) -> None:
    """Raise ValueError on all ranks unless they have the same settings, code and versions.

    Args:
        values: The configuration as plain values.
        method_module: Name of the method's module, possibly one that the user wrote.
    """
    if process_group.world_size() == 1:
        return
    settings = {
        key: value
        for key, value in schema.flatten(values).items()
        if key not in PER_MACHINE_KEYS and key.partition(".")[0] not in PER_MACHINE_SECTIONS
    }
    versions = {key: value for key, value in list_versions().items() if key != "revision"}
    sources = _source_hashes(method_module)
    _require_equal(lambda: settings, "start every rank with the same configuration and overrides")
    _require_equal(lambda: versions, "install the same versions on every machine")
    _require_equal(lambda: sources, "give every machine the same revision of the code")


def check_data(fingerprint: str, num_images: int, root: str) -> None:
    """Raise ValueError on all ranks unless they read the same training images."""
    values = {"data.root: training images": num_images, "data.root: fingerprint": fingerprint}
    hint = f" (data.root of this rank is {root!r})" if root else ""
    _require_equal(lambda: values, f"give every machine the same copy of the data set{hint}")


def check_checkpoints(run: Path) -> None:
    """Raise ValueError on all ranks unless they see the same checkpoints of the run."""

    def list_hashes() -> dict[str, str]:
        hashes = [f"{path.name} {_hash(path / MANIFEST_FILE)}" for path in list_checkpoints(run)]
        return {"output: checkpoints": ", ".join(hashes)}

    remedy = f"put output ({run}) on a file system that every machine mounts at that path"
    _require_equal(list_hashes, remedy, MOUNT_PATIENCE_SECONDS)


def _require_equal(
    get_values: Callable[[], dict[str, Any]], remedy: str, patience_seconds: float = 0.0
) -> None:
    """Raise ValueError on all ranks if their values still differ after `patience_seconds`."""
    if process_group.world_size() == 1:
        return
    patience_seconds = min(patience_seconds, process_group.timeout_seconds() / 2)
    start = time.monotonic()
    while True:
        values = get_values()
        text = json.dumps(values, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        digests, elapsed = zip(*collectives.gather_objects((digest, time.monotonic() - start)))
        if len(set(digests)) == 1:
            return
        if elapsed[0] >= patience_seconds:  # rank 0's clock decides for all ranks
            break
        time.sleep(RETRY_SECONDS)
    values_by_rank = collectives.gather_objects((socket.gethostname(), values))
    raise ValueError(f"the ranks disagree: {_describe_differences(values_by_rank)}; {remedy}")


def _describe_differences(values_by_rank: list[tuple[str, dict[str, Any]]]) -> str:
    """Describe the keys that differ, each with its values and the ranks that have them.

    Args:
        values_by_rank: Host name and values of each rank.
    """
    descriptions = []
    for key in sorted({key for _, values in values_by_rank for key in values}):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, (_, values) in enumerate(values_by_rank):
            value = repr(values[key]) if key in values else "absent"
            ranks_by_value.setdefault(value, []).append(rank)
        if len(ranks_by_value) > 1:
            groups = [
                f"{value} on {_describe_ranks(ranks, values_by_rank[ranks[0]][0])}"
                for value, ranks in ranks_by_value.items()
            ]
            descriptions.append(f"{key}: {', '.join(groups)}")
    num_hidden = len(descriptions) - MAX_DIFFERENCES
    rest = [f"and {num_hidden} more"] if num_hidden > 0 else []
    return "; ".join(descriptions[:MAX_DIFFERENCES] + rest)


def _describe_ranks(ranks: list[int], first_host: str) -> str:
    rest = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"rank {ranks[0]} ({first_host}){rest}"


def _source_hashes(method_module: str) -> dict[str, str]:
    """Return the hash of each source file that training uses, including a user's own method."""
    files = {
        f"{PACKAGE.name}/{path.relative_to(PACKAGE)}": path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in IGNORED_FOLDERS
    }
    method_file = getattr(sys.modules.get(method_module), "__file__", None)
    if method_file and not Path(method_file).is_relative_to(PACKAGE):
        files[f"method {method_module}"] = Path(method_file)
    return {name: _hash(path) for name, path in sorted(files.items())}


def _hash(path: Path) -> str:
    """Return a short hash of a file, or why the file cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        return f"unreadable ({error.strerror})"
