"""Each measure against a number known without running it: a known spectrum, a uniform sphere, a collapsed batch."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_pretrain.monitoring import collapse_metrics

GENERATOR = torch.Generator().manual_seed(0)


def with_spectrum(values, rows=64):
    """(rows, dim) with these singular values: orthonormal columns, scaled; each column sums to zero."""
    columns = torch.randn(rows, len(values), generator=GENERATOR, dtype=torch.float64)
    basis, _ = torch.linalg.qr(columns - columns.mean(0))
    return basis * torch.tensor(values, dtype=torch.float64)


def test_singular_values_are_those_of_a_decomposition_whichever_side_is_longer():
    for shape in ((40, 7), (7, 40)):
        z = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
        torch.testing.assert_close(collapse_metrics.singular_values(z), torch.linalg.svdvals(z))


def test_rankme_of_a_known_spectrum():
    """Singular values 2, 1, 1: the entropy of (1/2, 1/4, 1/4) is 1.5 ln 2."""
    values = collapse_metrics.singular_values(with_spectrum([2.0, 1.0, 1.0]))
    assert collapse_metrics.rank_of(values).item() == pytest.approx(
        math.exp(1.5 * math.log(2)), rel=1e-5
    )


def test_rank_of_a_sphere_is_its_dimension_and_of_nothing_is_one():
    z = torch.randn(4096, 16, generator=GENERATOR)
    assert collapse_metrics.rank_of(collapse_metrics.singular_values(z)).item() == pytest.approx(
        16, rel=0.01
    )
    assert collapse_metrics.rank_of(
        collapse_metrics.singular_values(collapse_metrics.centred(torch.ones(64, 16)))
    ).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_of_a_power_law_is_its_power(alpha):
    variances = torch.arange(1, 81, dtype=torch.float64) ** -alpha
    variances[:4] *= 7  # before the fit's first
    assert collapse_metrics.alpha_req(variances).item() == pytest.approx(alpha, rel=1e-9)
    spectrum = collapse_metrics.singular_values(
        with_spectrum([float(v) ** 0.5 for v in variances], rows=200)
    )
    assert collapse_metrics.alpha_req(spectrum.square()).item() == pytest.approx(alpha, rel=1e-6)
    assert math.isnan(collapse_metrics.alpha_req(variances[:5]).item())


def test_deviations_of_a_sphere_are_one_and_of_a_point_zero():
    z = torch.randn(20000, 16, generator=GENERATOR)
    torch.testing.assert_close(collapse_metrics.deviations(z), torch.ones(16), atol=0.03, rtol=0)
    assert collapse_metrics.deviations(torch.ones(64, 16)).abs().max() < 1e-5
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # one of two dimensions is dead
    torch.testing.assert_close(collapse_metrics.deviations(axis), torch.tensor([2**0.5, 0.0]))


def test_alignment_is_the_squared_distance_of_unit_vectors():
    z = torch.randn(32, 5, generator=GENERATOR)
    assert collapse_metrics.alignment(z, 3 * z).item() == pytest.approx(0, abs=1e-6)
    assert collapse_metrics.alignment(z, -z).item() == pytest.approx(4, rel=1e-6)
    assert collapse_metrics.alignment(
        torch.eye(4), torch.eye(4).roll(1, 0)
    ).item() == pytest.approx(2)


def test_uniformity_of_known_points_and_of_the_circle():
    assert collapse_metrics.uniformity(torch.ones(8, 3)).item() == pytest.approx(0, abs=1e-6)
    assert collapse_metrics.uniformity(torch.eye(6)).item() == pytest.approx(
        -4, rel=1e-6
    )  # all pairs at squared distance 2
    angles = torch.arange(4096, dtype=torch.float64) * 2 * math.pi / 4096
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    bessel = (
        torch.special.i0e(torch.tensor(4.0, dtype=torch.float64)).log().item()
    )  # the mean of exp(-4 + 4 cos) is e^-4 I0(4)
    assert collapse_metrics.uniformity(circle).item() == pytest.approx(bessel, abs=1e-3)


def test_the_positive_is_first_last_or_anywhere():
    eye = torch.eye(5)
    assert collapse_metrics.positive_rank(eye, eye).item() == 1
    assert collapse_metrics.positive_rank(eye, -eye).item() == 5
    assert collapse_metrics.positive_rank(
        torch.ones(9, 4), torch.ones(9, 4)
    ).item() == pytest.approx(5)  # collapsed: chance


def test_assignments_spread_evenly_and_all_on_one():
    for assigned, num, expected in (
        (torch.arange(12) % 4, 4, (1.0, 1.0)),
        (torch.zeros(12, dtype=torch.int64), 4, (0.25, 0.0)),
        (torch.arange(3), 1000, (1.0, 1.0)),  # three rows can reach three
        (torch.tensor([0, 0, 1, 1]), 4, (0.5, 0.5)),
    ):
        usage, entropy = collapse_metrics.assignments(assigned, num)
        assert (usage.item(), entropy.item()) == pytest.approx(expected)


def test_norm_is_of_all_tensors_together():
    assert collapse_metrics.norm(
        [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    ).item() == pytest.approx(5)
