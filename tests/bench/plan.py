"""What a plan says of this machine against what it does: seconds and peak memory of training steps, after a calibration.

PYTHONPATH=. .venv/bin/python -m ssl_pretrain.planning.calibrate --threads 1 --output runs/calibration.json
PYTHONPATH=. .venv/bin/python tests/bench/plan.py --calibration runs/calibration.json

With one thread on a CPU, seconds are the process's own, so that what else runs does not count. resnet18 and vit_tiny_patch16_224 are
what the calibration itself measured; the others it has not seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import mib, versions

from ssl_pretrain.parallel import memory
from ssl_pretrain.planning.calibrate import real_step, seconds_of
from ssl_pretrain.planning.estimate import backbone_step
from ssl_pretrain.planning.hardware import read_calibration

CASES = [  # backbone, pixels, images
    ("resnet18", 96, 16),
    ("vit_tiny_patch16_224", 224, 4),
    ("test_resnet", 64, 64),
    ("test_vit", 160, 32),
    ("resnet50", 64, 16),
    ("vit_small_patch16_224", 224, 2),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", type=Path, default=Path("runs/calibration.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each step's repetitions")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = read_calibration(options.calibration)
    print(versions("timm"))
    print(f"{machine.name}; {machine.source}; attained {machine.attained:.2f}")
    print(
        "| step | images | planned ms | measured ms | planned over measured | planned peak | measured peak |\n"
        + "|---" * 7
        + "|"
    )
    ratios = []
    for name, size, images in CASES:
        images = images if machine.on_cpu else 32 * images
        traced, step = (
            backbone_step(name, size, images, bfloat16=not machine.on_cpu),
            real_step(name, size, images, device),
        )
        planned, measured = machine.seconds(traced), seconds_of(step, device, options.seconds)
        peak = min(memory.peak(step, device) for _ in range(3))
        ratios.append(
            f"time_{name}={planned / measured:.2f} memory_{name}={traced.peak / peak:.2f}"
        )
        cells = f"{planned * 1e3:.1f} | {measured * 1e3:.1f} | {planned / measured:.2f} | {mib(traced.peak)} | {mib(peak)}"
        print(f"| {name}, {size} px | {images} | {cells} |", flush=True)
    print("ratios:", *ratios)


if __name__ == "__main__":
    main()
