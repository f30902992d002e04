"""Compare what the ranks were started with: settings, code, versions, data and checkpoints.

Each machine of a run has its own command line and its own copy of the code and the data. Ranks
that differ in one of them would train on together, each on something else.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssl_pretrain import schema
from ssl_pretrain.checkpoint import provenance
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.system.import_path import PACKAGE

# Keys that may differ between machines without changing what is computed.
PER_MACHINE = ("data.root", "data.cache_dir", "data.num_workers")
PER_MACHINE_SECTIONS = ("launch", "plan")
SHOWN = 4  # differences in one message
MOUNT_SECONDS = 90.0  # in which a network file system shows another machine's new files


def check_programs(values: dict[str, Any], method_module: str) -> None:
    """Raise ValueError on all ranks unless they have the same settings, code and versions.

    Args:
        values: The configuration as plain values.
        method_module: Module of the method, which may be a user's own.
    """
    if process_group.world_size() == 1:
        return
    settings = {
        key: value for key, value in schema.flatten(values).items() if not _is_per_machine(key)
    }
    _require(
        lambda: settings, "start every rank with the same configuration and the same key=value"
    )
    versions = {key: value for key, value in provenance.versions().items() if key != "revision"}
    _require(lambda: versions, "install the same versions on every machine")
    _require(lambda: _sources(method_module), "give every machine the same revision of the code")


def check_data(fingerprint: str, num_images: int, root: str) -> None:
    """Raise ValueError on all ranks unless they read the same training images."""
    facts = {"data.root: training images": num_images, "data.root: fingerprint": fingerprint}
    where = f" (data.root is {root!r} here)" if root else ""
    _require(lambda: facts, f"give every machine the same copy of the data set{where}")


def check_checkpoints(run: Path, manifests: Callable[[], list[Path]]) -> None:
    """Raise ValueError on all ranks unless they would resume from the same checkpoints."""

    def facts() -> dict[str, str]:
        names = {path.parent.name: _digest(path) for path in manifests()}
        return {
            "output: checkpoints": ", ".join(f"{name} {digest}" for name, digest in names.items())
        }

    remedy = f"put output ({run}) on a file system that every machine has mounted at that place"
    _require(facts, remedy, MOUNT_SECONDS)


def _require(facts: Callable[[], dict[str, Any]], remedy: str, patience: float = 0.0) -> None:
    if process_group.world_size() == 1:
        return
    patience = min(patience, process_group.timeout_seconds() / 2)
    began = time.monotonic()
    while True:
        own = facts()
        digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
        digests, elapsed = zip(*collectives.gather_objects((digest, time.monotonic() - began)))
        if len(set(digests)) == 1:
            return
        if elapsed[0] >= patience:  # the same decision on all ranks
            break
        time.sleep(2)
    answers = collectives.gather_objects((socket.gethostname(), own))
    raise ValueError(f"the ranks disagree: {_differences(answers)}; {remedy}")


def _differences(answers: list[tuple[str, dict[str, Any]]]) -> str:
    """The keys that differ, each with its values and the ranks that have them."""
    keys = sorted({key for _, facts in answers for key in facts})
    texts = []
    for key in keys:
        holders: dict[str, list[int]] = {}
        for rank, (_, facts) in enumerate(answers):
            holders.setdefault(repr(facts[key]) if key in facts else "absent", []).append(rank)
        if len(holders) > 1:
            parts = [f"{value} on {_named(ranks, answers)}" for value, ranks in holders.items()]
            texts.append(f"{key}: {', '.join(parts)}")
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "; ".join(texts[:SHOWN] + more)


def _named(ranks: list[int], answers: list[tuple[str, dict[str, Any]]]) -> str:
    first = f"rank {ranks[0]} ({answers[ranks[0]][0]})"
    return first if len(ranks) == 1 else f"{first} and {len(ranks) - 1} more"


NOT_TRAINING = {"eval", "launch"}  # in a clone these are links, in a wheel they are folders


def _sources(method_module: str) -> dict[str, str]:
    """Digest of every source file that training uses, and of a method that lies outside the package."""
    files = {
        f"{PACKAGE.name}/{path.relative_to(PACKAGE)}": path
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] not in NOT_TRAINING
    }
    own = getattr(sys.modules.get(method_module), "__file__", None)
    if own and not Path(own).is_relative_to(PACKAGE):
        files[f"method {method_module}"] = Path(own)
    return {name: _digest(path) for name, path in sorted(files.items())}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        return f"unreadable ({error.strerror})"


def _is_per_machine(key: str) -> bool:
    return key in PER_MACHINE or key.partition(".")[0] in PER_MACHINE_SECTIONS
