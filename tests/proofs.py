"""The first columns of the README's table, measured: PYTHONPATH=. .venv/bin/python tests/proofs.py

Gradient error: the largest difference between our gradient by the embeddings and that of the paper's equation in plain
loops, over its largest entry, float64. 1 = 2 = 3 ranks: the same for a shared weight's gradient, averaged over ranks as
DDP does, between one process and 2 and 3 ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "losses")]

from conftest import run_ranks
from test_contrastive import _weights_gradient, slow_nt_xent, views

from ssl_pretrain.losses.contrastive import nt_xent


def largest(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def main() -> None:
    z = [z.clone().requires_grad_() for z in views(rows=64, dim=32)]
    errors = []
    for temperature in (0.1, 0.2, 0.5):
        ours = torch.autograd.grad(nt_xent(*z, temperature=temperature), z)
        theirs = torch.autograd.grad(slow_nt_xent(*z, temperature), z)
        errors += [largest(got, want) for got, want in zip(ours, theirs)]
    alone = _weights_gradient(*views())[1]
    ranks = {size: max(largest(got, alone) for _, got in run_ranks(_weights_gradient, *views(), world_size=size)) for size in (2, 3)}
    print(f"torch {torch.__version__}")
    print(f"simclr: gradient error {max(errors):.1e}; " + "; ".join(f"{size} ranks {error:.1e}" for size, error in ranks.items()))


if __name__ == "__main__":
    main()
