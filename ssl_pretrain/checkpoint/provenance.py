"""On what, and with which code, a run computes: for the manifests of its checkpoints."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.distributed import process_group
from ssl_pretrain.system.import_path import PACKAGE


def machine() -> dict[str, Any]:
    """What must be the same for a resumed run to be bit for bit the one that never stopped."""
    return {
        "world_size": process_group.world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("ssl_pretrain", "torch", "torchvision", "timm", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"revision": _revision()}


@functools.cache
def _revision() -> str:
    """Of the code, where it is a git checkout."""
    try:
        command = [
            "git",
            "-C",
            str(PACKAGE),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
