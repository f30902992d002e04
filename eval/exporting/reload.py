"""Load every format of an export in a process of its own, and compare its features."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ssl_pretrain import rng
from ssl_pretrain.data.pixels import RGB
from ssl_pretrain.eval.exporting import onnx
from ssl_pretrain.eval.image_transform import ImageTransform

SCRIPT = Path(__file__).with_name("reload_script.py")
TOLERANCE = 1e-5  # largest accepted difference, relative to the largest feature
TIMEOUT_SECONDS = 600
SAMPLE_FILE, SAMPLE_SHAPE = "sample.safetensors", (301, 403)  # height and width in pixels
# Variables of a training that a new process must not inherit.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Reload:
    """Differences of a format from the backbone, measured in another process.

    Attributes:
        difference: Largest difference of the features, relative to the largest feature.
        views: Largest difference of the library's own transform, in units of normalized pixels, or
            None if it has no transform.
        versions: Version of each package that loaded the format.
    """

    difference: float
    views: float | None
    versions: dict[str, str]


def verify(folder: Path, formats: Sequence[str], transform: ImageTransform) -> dict[str, Reload]:
    """Load each format in a process of its own and compare its features with the reference.

    The processes run at the same time.

    Args:
        folder: Folder of the export.
        formats: Formats that it has.
        transform: Transform of the export, with which those of the libraries are compared.

    Raises:
        ValueError: If a format cannot be loaded, or its features differ. The message names it.
    """
    sample = folder / SAMPLE_FILE
    if transform.pixel_format == RGB:
        pixels = sample_image()
        save_file({"pixels": pixels, "view": transform(pixels.numpy()).contiguous()}, sample)
    try:
        return _run_processes(folder, formats)
    finally:
        sample.unlink(missing_ok=True)


def sample_image() -> Tensor:
    """Return smooth noise, uint8 (height, width, 3), which is the same on every machine."""
    height, width = SAMPLE_SHAPE
    values = rng.uniform(0, 2, np.arange(1), 0, rng.Purpose.SUBSET, 3 * 24 * 32)
    noise = torch.from_numpy(values.reshape(1, 3, 24, 32))
    smooth = functional.interpolate(noise, (height, width), mode="bicubic")
    return (255 * smooth[0].permute(1, 2, 0)).round().clamp(0, 255).to(torch.uint8).contiguous()


def _run_processes(folder: Path, formats: Sequence[str]) -> dict[str, Reload]:
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES} | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    processes = {
        name: subprocess.Popen(
            # Without -P, the modules beside the script would hide packages such as onnx.
            [sys.executable, "-P", str(SCRIPT), name, str(folder.resolve())],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        for name in formats
    }
    try:
        return {name: _result(name, process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def _result(name: str, process: "subprocess.Popen[str]") -> Reload:
    try:
        output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"--format {name}: was not loaded within {TIMEOUT_SECONDS} seconds in another process;"
            f" leave {name} out of --format"
        ) from None
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise ValueError(
            f"--format {name}: cannot be loaded in another process: {reason}; leave {name} out of"
            " --format"
        )
    values: dict[str, Any] = json.loads(output.splitlines()[-1])
    tolerance = onnx.TOLERANCE if name == "onnx" else TOLERANCE
    difference = values["difference"] / max(values["largest"], sys.float_info.min)
    if name == "torchhub" and values["views"]:
        raise ValueError(
            f"--format torchhub: the transform of preprocessing.py differs by {values['views']:.2g}"
            " from that of the evaluations; leave torchhub out of --format"
        )
    if not difference <= tolerance:
        raise ValueError(
            f"--format {name}: loaded in another process, its features differ by up to"
            f" {values['difference']:.2g}, and the largest feature is {values['largest']:.2g};"
            f" leave {name} out of --format"
        )
    return Reload(difference, values["views"], values["versions"])
