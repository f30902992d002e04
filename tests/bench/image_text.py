"""Time and memory of the image-text losses, forward and backward: ours and open_clip's.

PYTHONPATH=. .venv/bin/python tests/bench/image_text.py                 8,192 and 32,768 pairs
PYTHONPATH=. .venv/bin/python tests/bench/image_text.py --pairs 8192

Gradients are those of the embeddings before normalization, the scale and the bias. Memory is the
peak beyond the inputs and their gradients. Each peak is measured in a process of its own, which may
use 90 % of the free memory.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from measure import format_mib, measure_peaks, time_interleaved, versions
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.losses import image_text, sigmoid_image_text
from ssl_pretrain.parallel.memory import available_bytes

CPU = torch.device("cpu")
DIM = 512
# Scale and bias at the start of training, of CLIP and of SigLIP.
CLIP_SCALE, SIGLIP_SCALE, SIGLIP_BIAS = 1 / 0.07, 10.0, -10.0
NAMES = {"CLIP": ("clip ours", "clip open_clip"), "SigLIP": ("siglip ours", "siglip open_clip")}


def build_runs(num_pairs: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return functions that compute a loss and return its gradients, by name."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.randn(num_pairs, DIM, generator=generator).requires_grad_() for _ in range(2)
    )
    clip_scale, siglip_scale, bias = (
        torch.tensor(value, requires_grad=True) for value in (CLIP_SCALE, SIGLIP_SCALE, SIGLIP_BIAS)
    )
    clip, siglip = ClipLoss(), SigLipLoss()

    def unit() -> list[Tensor]:
        return [F.normalize(z, dim=1) for z in (images, texts)]

    losses = {
        "clip ours": lambda: image_text(images, texts, clip_scale.expand(num_pairs)),
        "clip open_clip": lambda: clip(*unit(), clip_scale),
        "siglip ours": lambda: sigmoid_image_text(
            images, texts, siglip_scale.expand(num_pairs), bias.expand(num_pairs)
        ),
        "siglip open_clip": lambda: siglip(*unit(), siglip_scale, bias),
    }

    def gradients_of(name: str) -> Callable[[], tuple[Tensor, ...]]:
        numbers = [clip_scale] if name.startswith("clip") else [siglip_scale, bias]
        return lambda: torch.autograd.grad(losses[name](), [images, texts, *numbers])

    return {name: gradients_of(name) for name in losses}


def check_equal(num_pairs: int = 256) -> None:
    """Compare our gradients with open_clip's on a few pairs."""
    runs = build_runs(num_pairs)
    for ours, theirs in NAMES.values():
        for value, expected in zip(runs[ours](), runs[theirs](), strict=True):
            error = (value - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, f"{ours} computes other gradients"


def print_peak(name: str, num_pairs: int) -> None:
    """Print the peak bytes of one loss beyond its inputs and their gradients."""
    build_runs(256)[name]()  # allocates what lasts
    run = {name: build_runs(num_pairs)[name]}
    limit = int(0.9 * available_bytes(CPU)) + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(measure_peaks(run, CPU)[name] - 2 * num_pairs * DIM * 4)


def measure_peak(name: str, num_pairs: int, num_threads: int) -> int | None:
    """Return the peak bytes of one loss, or None if it does not fit in memory."""
    command = [sys.executable, __file__, "--pairs", str(num_pairs), "--peak-of", name]
    command += ["--threads", str(num_threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return int(result.stdout)
    was_killed = result.returncode < 0
    assert was_killed or "can't allocate memory" in result.stderr, result.stderr
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options.peak_of, options.pairs[0])
        return
    check_equal()
    print(versions("open_clip_torch"))
    print(
        f"dim {DIM}, forward + backward, median of {options.rounds}, interleaved; open_clip may "
        f"use {format_mib(0.9 * available_bytes(CPU))}"
    )
    memory_ratios, time_ratios = [], []
    for num_pairs in options.pairs:
        names = [name for pair in NAMES.values() for name in pair]
        peaks = {name: measure_peak(name, num_pairs, options.threads) for name in names}
        runs = {name: run for name, run in build_runs(num_pairs).items() if peaks[name]}
        seconds = time_interleaved(runs, options.rounds, CPU)
        for name in names:
            peak = peaks[name]
            result = f"{seconds[name]:8.2f} s {format_mib(peak):>14s}" if peak else "does not fit"
            print(f"{num_pairs:6,} pairs  {name:17s} {result}", flush=True)
        for ours, theirs in NAMES.values():
            our_peak, their_peak = peaks[ours], peaks[theirs]
            if our_peak and their_peak:
                memory_ratios.append(their_peak / our_peak)
                time_ratios.append(seconds[theirs] / seconds[ours])
    # NaN if open_clip does not fit for any size.
    nan = float("nan")
    print(
        f"ratios: memory_vs_open_clip={min(memory_ratios, default=nan):.1f} "
        f"time_vs_open_clip={min(time_ratios, default=nan):.2f}"
    )


if __name__ == "__main__":
    main()
