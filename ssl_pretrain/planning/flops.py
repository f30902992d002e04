"""How many floating-point operations a training step takes, and how many a GPU could do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# peak of a GPU in bfloat16 (float16 where it has no bfloat16), dense, TFLOP/s: NVIDIA's data sheets; the first name that fits
PEAKS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100 NVL", 835.0), ("H100", 989.0), ("A100", 312.0), ("A40", 149.7),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0), ("A10", 125.0), ("V100", 125.0), ("T4", 65.0), ("RTX 4090", 165.2), ("RTX 3090", 71.0),
)  # fmt: skip


def per_image(method: Any, batch: Any) -> float:
    """Operations of a step for each image: the student's forward, twice as many backward, and the teacher's forward.

    Matrix products and convolutions alone, as is usual. Recomputed forwards (parts in two passes) do not count.

    Args:
        method, batch: on the meta device, so that nothing is computed.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as student:
        method(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as teacher:
        method.targets(batch)
    return (3 * student.get_total_flops() + teacher.get_total_flops()) / len(batch)


def peak_tflops(device: torch.device) -> float:
    """Of this device in bfloat16; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS if part in name), 0.0)
