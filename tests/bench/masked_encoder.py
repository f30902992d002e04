"""Cost of a ViT on the visible patches of MAE, relative to all patches: time, operations, memory.

    PYTHONPATH=. .venv/bin/python tests/bench/masked_encoder.py [--backbone vit_small_patch16_224]

A pass is forward and backward. The decoder is not included.
"""

import argparse

import torch
from measure import format_mib, measure_peaks, time_interleaved, versions
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain.models import backbones


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--visible", type=float, default=0.25, help="share of the patches")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = backbones.build(backbones.BackboneConfig(options.backbone), options.size).to(device)
    images = torch.randn(options.images, 3, options.size, options.size, device=device)
    num_patches = (options.size // backbone.patch_size) ** 2
    visible = torch.rand(options.images, num_patches, device=device).argsort(dim=1)
    visible = visible[:, : int(num_patches * options.visible)]

    def run(kept: torch.Tensor | None) -> None:
        backbone.zero_grad(set_to_none=False)
        backbone.tokens(images, kept=kept).patches.square().mean().backward()

    passes = {"all": lambda: run(None), "visible": lambda: run(visible)}
    num_operations = {}
    for name, one_pass in passes.items():
        with FlopCounterMode(display=False) as counter:
            one_pass()
        num_operations[name] = counter.get_total_flops()
    seconds = time_interleaved(passes, options.repeats, device)
    peak_bytes = measure_peaks(passes, device)
    print(versions("timm"))
    print(
        f"{options.backbone}, {options.images} images of {options.size} pixels, "
        f"{visible.shape[1]} of {num_patches} patches, median of {options.repeats}"
    )
    for name in passes:
        print(
            f"{name}: {seconds[name]:.3f} s, {num_operations[name] / 1e9:,.0f} billion operations, "
            f"peak {format_mib(peak_bytes[name])}"
        )
    values = {"time": seconds, "operations": num_operations, "memory": peak_bytes}
    print(
        "ratios:",
        *(f"{key}={value['visible'] / value['all']:.3f}" for key, value in values.items()),
    )


if __name__ == "__main__":
    main()
