"""Print the largest relative errors of the fused kernels against slow references.

Cases in float32 are compared with the plain tiles, and cases in half precision with the plain tiles
in float64 on the same numbers.

    python tests/losses/kernels.py [cpu|cuda]

On a CPU, Triton's interpreter runs them. TRITON_INTERPRET=1 must be set before Triton is imported.
Tests call `measure_errors`.
"""

import sys
from dataclasses import replace

import torch
from torch.nn import functional as F

from ssl_pretrain.losses import image_text, moco_v3, nt_xent, supervised_contrastive, tiles
from ssl_pretrain.losses.backend import BACKENDS, use_backend
from ssl_pretrain.losses.half_precision import half_rows, scaled_pair

# Numbers of rows and of candidates, dim, local_start, excluded_offsets and scale. If the number of
# candidates is None, the rows are compared with one another.
CASES = {
    "nt_xent": (70, None, 24, 0, (0,), 10.0),
    "decoupled": (66, None, 16, 0, (0, 33, -33), 5.0),
    "low temperature, whose exponentials overflow unshifted": (40, None, 16, 0, (0,), 500.0),
    "logits up to 100, CLIP's largest": (40, None, 16, 0, (0,), 100.0),
    "info_nce": (50, 150, 40, 0, (), 5.0),
    "anchors of another rank": (40, 130, 16, 40, (0, 7), 3.0),
    "wide": (20, 90, 200, 0, (), 5.0),
}
# Cases that also run in half precision, and the dimensions with which they do.
HALF_CASES = {
    "nt_xent": (8, 24, 128, 200),
    "decoupled": (16,),
    "logits up to 100, CLIP's largest": (16,),
    "info_nce": (40, 100, 256),
    "anchors of another rank": (16,),
}
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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


def compute_half_values(
    name: str, dim: int, dtype: torch.dtype, device: str, exact: bool
) -> dict[str, torch.Tensor]:
    """Return the values of a case for embeddings of any length in half precision.

    Gradients are those of the embeddings of unit length, which are in float32.

    Args:
        name: Name of the case.
        dim: Dimension of the embeddings.
        dtype: Data type to which the embeddings are rounded.
        device: Device that computes the values.
        exact: True to compute plain tiles in float64 from the rounded embeddings.
    """
    num_rows, num_candidates, _, local_start, excluded_offsets, scale = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random_rows(count: int) -> torch.Tensor:
        # The lengths of the rows span two orders of magnitude.
        lengths = 10 ** (2 * torch.rand(count, 1, generator=generator) - 1)
        rows = (torch.randn(count, dim, generator=generator) * lengths).to(dtype).to(device)
        return rows.double() if exact else rows

    def normalize(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows if exact else rows.float(), dim=1).requires_grad_()

    weights = torch.randn(num_rows, generator=generator).to(device)
    rows = random_rows(num_rows)
    z, half = normalize(rows), half_rows(rows)
    exclusion = {"excluded_offsets": excluded_offsets}
    with use_backend(replace(BACKENDS[device], fused=not exact)):
        if num_candidates is None:
            lse, _ = tiles.symmetric_log_sum_exp(z, scale=scale, half=half, **exclusion)
            (z_gradient,) = torch.autograd.grad((lse * weights).sum(), [z])
            return {"lse": lse, "gradient of z": z_gradient}
        candidate_rows = random_rows(num_candidates)
        candidates = normalize(candidate_rows)
        lse = tiles.log_sum_exp(
            z * scale,
            candidates,
            logit_bound=scale,
            local_start=local_start,
            half=scaled_pair(half, half_rows(candidate_rows), scale),
            **exclusion,
        )
        gradients = torch.autograd.grad((lse * weights).sum(), [z, candidates])
    names = ["gradient of the anchors", "gradient of the candidates"]
    return {"lse": lse, **dict(zip(names, gradients, strict=True))}


def measure_half_errors(name: str, dim: int, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return the largest difference of each value, relative to its largest entry."""
    exact, fused = (compute_half_values(name, dim, dtype, device, exact) for exact in (True, False))
    return {
        key: ((fused[key] - expected).abs().max() / expected.abs().max()).item()
        for key, expected in exact.items()
    }


# Public losses, with the arguments of `measure_loss_errors`.
HALF_LOSSES = {
    "nt_xent": lambda a, b: nt_xent(a, b, temperature=0.2),
    "supervised_contrastive": lambda a, b: supervised_contrastive(
        a, b, torch.arange(len(a), device=a.device) % 5, temperature=0.2
    ),
    "moco_v3": lambda a, b: moco_v3(a, b, b, a, temperature=0.2),
    "image_text": lambda a, b: image_text(a, b, a.new_full((len(a),), 10.0)),
}


def measure_loss_errors(name: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return the relative errors of a public loss and of its gradients by the fused kernels.

    The reference is computed in float64 and its gradients are rounded to `dtype`, which the fused
    gradients must have.
    """
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(40, 48, generator=generator).to(device, dtype) for _ in range(2)]
    values = []
    for z, fused in ((half, True), ([x.double() for x in half], False)):
        z = [x.clone().requires_grad_() for x in z]
        with use_backend(replace(BACKENDS[device], fused=fused)):
            loss = HALF_LOSSES[name](*z)
            values.append((loss.double(), *torch.autograd.grad(loss, z)))
    (loss, *gradients), (expected_loss, *expected_gradients) = values
    assert all(gradient.dtype == dtype for gradient in gradients), "gradients change the data type"
    errors = {"loss": ((loss - expected_loss).abs() / expected_loss.abs()).item()}
    for key, gradient, expected in zip("ab", gradients, expected_gradients, strict=True):
        difference = gradient.double() - expected.to(dtype).double()
        errors[f"gradient of z_{key}"] = (difference.abs().max() / expected.abs().max()).item()
    return errors


def measure_all(device: str) -> dict[str, dict[str, float]]:
    """Return the errors of every case, by its name."""
    errors = {f"float32 {name}": measure_errors(name, device) for name in CASES}
    for dtype_name, dtype in HALF_DTYPES.items():
        for name, dims in HALF_CASES.items():
            for dim in dims:
                key = f"{dtype_name} {name} with dim {dim}"
                errors[key] = measure_half_errors(name, dim, dtype, device)
        for name in HALF_LOSSES:
            key = f"{dtype_name} gradients of {name}"
            errors[key] = measure_loss_errors(name, dtype, device)
    return errors


def largest_allowed_error(name: str) -> float:
    """Return the bound for a case of `measure_all`.

    Rounding the gradients of a public loss to half precision may add one unit in the last place.
    In half precision, bfloat16 weights from two instead of three parts would have errors of 1e-5.
    """
    if "gradients" in name:
        return 2**-7 if name.startswith("bfloat16") else 2**-10
    return 2e-5 if name.startswith("float32") or "CLIP" in name else 2e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, errors in measure_all((sys.argv[1:] or ["cpu"])[0]).items():
        error_list = ", ".join(f"{key} {error:.2g}" for key, error in errors.items())
        print(f"{max(errors.values()):.3g}  {name}: {error_list}")
