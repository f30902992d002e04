"""The machine, package versions and revision of the code, recorded in each checkpoint."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.distributed import process_group
from ssl_pretrain.system.import_path import PACKAGE

PACKAGES = ("ssl_pretrain", "torch", "torchvision", "timm", "numpy")


def machine() -> dict[str, Any]:
    """Describe what must stay the same for a resume that is bit for bit."""
    return {
        "world_size": process_group.world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and the main packages, and the revision of this code."""
    installed = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **installed, "revision": _revision()}


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
