"""Time the fused contrastive losses against plain torch and public fused kernels.

    python tests/gpu/losses.py [--tiny]

Forward and backward on unit rows, one JSON line. SimCLR's loss is compared with the cross entropy
of the whole matrix of similarities. CLIP's image-text loss is compared with that, with open_clip's
ClipLoss and with Inf-CL, where those are installed. Interleaved, median of --repeats.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bench")]
from measure import measure_peaks, time_interleaved, versions

from ssl_pretrain.losses import image_text, nt_xent

SIZES = ((4096, 128), (16384, 128), (16384, 512))  # images, dim
SCALE = 10.0  # 1 / temperature
Loss = Callable[[Tensor, Tensor], Tensor]


def plain_nt_xent(z_a: Tensor, z_b: Tensor) -> Tensor:
    z = F.normalize(torch.cat([z_a, z_b]).float(), dim=1)
    logits = SCALE * z @ z.T
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z_a)))


def plain_image_text(z_a: Tensor, z_b: Tensor) -> Tensor:
    logits = SCALE * F.normalize(z_a.float(), dim=1) @ F.normalize(z_b.float(), dim=1).T
    labels = torch.arange(len(z_a), device=z_a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def build_public_losses() -> dict[str, Loss | str]:
    """Return the public losses by name, or "not installed" in their place."""
    losses: dict[str, Loss | str] = {
        "open_clip ClipLoss": "not installed",
        "Inf-CL": "not installed",
    }
    try:
        from open_clip.loss import ClipLoss

        criterion = ClipLoss()
        losses["open_clip ClipLoss"] = lambda z_a, z_b: criterion(
            F.normalize(z_a, dim=1), F.normalize(z_b, dim=1), SCALE
        )
    except ImportError:
        pass
    try:
        from inf_cl import cal_inf_loss

        def inf_cl(z_a: Tensor, z_b: Tensor) -> Tensor:
            a, b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
            scale = torch.tensor(SCALE, device=a.device)
            return (cal_inf_loss(a, b, scale=scale) + cal_inf_loss(b, a, scale=scale)) / 2

        losses["Inf-CL"] = inf_cl
    except ImportError:
        pass
    return losses


def measure(size: tuple[int, int], device: torch.device, repeats: int) -> dict[str, Any]:
    """Return milliseconds and added MiB of each loss for one size, or why it was not measured."""
    num_images, dim = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [
        torch.randn(num_images, dim, device=device, dtype=dtype).requires_grad_() for _ in range(2)
    ]
    losses: dict[str, Loss | str] = {
        "nt_xent": lambda z_a, z_b: nt_xent(z_a, z_b, temperature=1 / SCALE),
        "nt_xent, plain": plain_nt_xent,
        "image_text": lambda z_a, z_b: image_text(
            z_a, z_b, torch.full((len(z_a),), SCALE, device=z_a.device)
        ),
        "image_text, plain": plain_image_text,
        **build_public_losses(),
    }
    steps: dict[str, Callable[[], object]] = {}
    results: dict[str, Any] = {}
    for name, loss in losses.items():
        if isinstance(loss, str):
            results[name] = loss
            continue

        def step(loss: Loss = loss) -> object:
            return torch.autograd.grad(loss(*rows).float(), rows)

        try:
            step()
            steps[name] = step
        except torch.OutOfMemoryError:
            results[name] = "out of memory"
    seconds, peaks = time_interleaved(steps, repeats, device), measure_peaks(steps, device)
    return results | {
        name: {"ms": seconds[name] * 1e3, "added_mib": peaks[name] / 2**20} for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="256 images, to check this script")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = ((256, 32),) if options.tiny else SIZES
    results = {
        f"{size[0]:,} images, {size[1]} numbers": measure(size, device, options.repeats)
        for size in sizes
    }
    print(json.dumps({"versions": versions(), "sizes": results}))


if __name__ == "__main__":
    main()
