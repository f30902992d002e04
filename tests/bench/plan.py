"""Compare the planned time and peak memory of training steps with measurements on this machine.

    PYTHONPATH=. .venv/bin/python tests/bench/plan.py --gpu H100

Times are planned from the data sheet of the GPU that `--gpu` names, so they are only printed with
it. Memory is planned without a data sheet and is compared on any machine.
"""

import argparse
from collections.abc import Callable

import torch
from measure import format_mib, time_interleaved, versions

from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import memory
from ssl_pretrain.planning.hardware import MACHINES
from ssl_pretrain.planning.step_trace import trace_backbone

CASES = [  # backbone, image size in pixels, images on a CPU
    ("resnet18", 96, 16),
    ("vit_tiny_patch16_224", 224, 4),
    ("test_resnet", 64, 64),
    ("test_vit", 160, 32),
    ("resnet50", 64, 16),
    ("vit_small_patch16_224", 224, 2),
]
GPU_FACTOR = 32  # images on a GPU per image on a CPU


def build_step(name: str, size: int, images: int, device: torch.device) -> Callable[[], None]:
    """Return the forward and backward pass of a backbone on random views."""
    memory_format = torch.channels_last
    backbone = backbones.build(BackboneConfig(name=name), size).to(
        device, memory_format=memory_format
    )
    views = torch.randn(images, 3, size, size, device=device).to(memory_format=memory_format)

    def step() -> None:
        backbone.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            features = backbone(views)
        features.float().mean().backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=MACHINES, help="data sheet for the planned times")
    parser.add_argument("--repeats", type=int, default=10, help="repetitions of each step")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(versions("timm"))
    print("| step | images | planned ms | measured ms | planned peak | measured peak |")
    print("|---" * 6 + "|")
    for name, size, images in CASES:
        images *= GPU_FACTOR if device.type == "cuda" else 1
        trace = trace_backbone(name, size, images, bfloat16=device.type == "cuda")
        step = build_step(name, size, images, device)
        step()
        measured_ms = time_interleaved({"step": step}, options.repeats, device)["step"] * 1e3
        planned_ms = (
            f"{MACHINES[options.gpu].trace_seconds(trace) * 1e3:.1f}" if options.gpu else "-"
        )
        peak = min(memory.measure_peak_bytes(step, device) for _ in range(3))
        peak_cells = f"{format_mib(trace.peak_bytes)} | {format_mib(peak)}"
        print(f"| {name}, {size} px | {images} | {planned_ms} | {measured_ms:.1f} | {peak_cells} |")


if __name__ == "__main__":
    main()
