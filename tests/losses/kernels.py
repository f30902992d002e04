"""Print the largest relative errors of the fused kernels against the plain tiles.

    python tests/losses/kernels.py [cpu|cuda]

On a CPU, Triton's interpreter runs them. TRITON_INTERPRET=1 must be set before Triton is imported.
Tests call `measure_errors`.
"""

import sys
from dataclasses import replace

import torch
from torch.nn import functional as F

from ssl_pretrain.losses import tiles
from ssl_pretrain.losses.backend import BACKENDS, use_backend

# Numbers of rows and of candidates, dim, local_start, excluded_offsets and scale. If the number of
# candidates is None, the rows are compared with one another.
CASES = {
    "nt_xent": (70, None, 24, 0, (0,), 10.0),
    "decoupled": (66, None, 16, 0, (0, 33, -33), 5.0),
    "low temperature, whose exponentials overflow unshifted": (40, None, 16, 0, (0,), 500.0),
    "info_nce": (50, 150, 40, 0, (), 5.0),
    "anchors of another rank": (40, 130, 16, 40, (0, 7), 3.0),
    "wide": (20, 90, 200, 0, (), 5.0),
}


def compute_values(name: str, device: str, fused: bool) -> dict[str, torch.Tensor]:
    """Return the log-sum-exps of a case, and the gradients of their weighted sum."""
    num_rows, num_candidates, dim, local_start, excluded_offsets, scale = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random_unit_rows(count: int) -> torch.Tensor:
        rows = torch.randn(count, dim, generator=generator)
        return F.normalize(rows, dim=1).to(device).requires_grad_()

    weights = torch.randn(num_rows, generator=generator).to(device)
    z = random_unit_rows(num_rows)
    with use_backend(replace(BACKENDS[device], fused=fused)):
        if num_candidates is None:
            lse, _ = tiles.symmetric_log_sum_exp(z, scale=scale, excluded_offsets=excluded_offsets)
            (z_gradient,) = torch.autograd.grad((lse * weights).sum(), [z])
            return {"lse": lse, "gradient of z": z_gradient}
        candidates = random_unit_rows(num_candidates)
        lse = tiles.log_sum_exp(
            z * scale,
            candidates,
            logit_bound=scale,
            local_start=local_start,
            excluded_offsets=excluded_offsets,
        )
        z_gradient, candidates_gradient = torch.autograd.grad(
            (lse * weights).sum(), [z, candidates]
        )
        return {
            "lse": lse,
            "gradient of the anchors": z_gradient,
            "gradient of the candidates": candidates_gradient,
        }


def measure_errors(name: str, device: str) -> dict[str, float]:
    """Return the largest difference of each value, relative to its largest entry."""
    plain, fused = (compute_values(name, device, fused) for fused in (False, True))
    errors = {}
    for key, expected in plain.items():
        errors[key] = ((fused[key] - expected).abs().max() / expected.abs().max()).item()
    return errors


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        errors = measure_errors(name, (sys.argv[1:] or ["cpu"])[0])
        error_list = ", ".join(f"{key} {error:.2g}" for key, error in errors.items())
        print(f"{max(errors.values()):.3g}  {name}: {error_list}")
