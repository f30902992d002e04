"""Time and memory of NT-Xent, forward and backward: ours, lightly's class and the full matrix.

PYTHONPATH=. .venv/bin/python tests/bench/loss.py                        8,192 images, dim 128
PYTHONPATH=. .venv/bin/python tests/bench/loss.py --images 65536 --only ours
"""

import argparse

import torch
from measure import format_mib, measure_peaks, time_interleaved, versions
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import nt_xent


def plain_nt_xent(z_a: torch.Tensor, z_b: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross entropy over the full similarity matrix."""
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(float("-inf"))
    n = len(z_a)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--only", nargs="*", default=["ours", "lightly", "plain"])
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (
        torch.randn(options.images, options.dim, generator=generator).to(device).requires_grad_()
        for _ in range(2)
    )

    losses = {
        "ours": lambda: nt_xent(z_a, z_b, temperature=options.temperature),
        "plain": lambda: plain_nt_xent(z_a, z_b, options.temperature),
    }
    if "lightly" in options.only:
        from lightly.loss import NTXentLoss

        lightly_loss = NTXentLoss(temperature=options.temperature)
        losses["lightly"] = lambda: lightly_loss(z_a, z_b)

    def forward_and_backward(loss):
        def run():
            torch.autograd.grad(loss(), [z_a, z_b])

        return run

    runs = {name: forward_and_backward(losses[name]) for name in options.only}
    print(versions(*(["lightly"] if "lightly" in options.only else [])))
    print(
        f"{options.images:,} images, 2 views, dim {options.dim}; forward + backward, "
        f"median of {options.repeats}, interleaved"
    )
    if len(options.only) > 1:
        reference = losses["ours"]().item()
        for name in options.only:
            error = abs(losses[name]().item() - reference)
            assert error < 1e-4 * reference, f"{name} computes a different loss"
    seconds, peak_bytes = (
        time_interleaved(runs, options.repeats, device),
        measure_peaks(runs, device),
    )
    for name in options.only:
        print(
            f"{name:10s} {seconds[name]:8.3f} s   "
            f"peak extra memory {format_mib(peak_bytes[name]):>14s}"
        )
    if len(options.only) > 1:
        ratios = []
        for name in options.only:
            if name != "ours":
                ratios.append(f"time_vs_{name}={seconds[name] / seconds['ours']:.2f}")
                ratios.append(f"memory_vs_{name}={peak_bytes[name] / peak_bytes['ours']:.1f}")
        print("ratios:", *ratios)
    else:
        print(f"ratios: seconds={seconds['ours']:.3f} memory_mib={peak_bytes['ours'] / 2**20:.1f}")


if __name__ == "__main__":
    main()
