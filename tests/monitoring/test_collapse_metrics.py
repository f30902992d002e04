"""Each collapse metric against a value known without running it."""

import math

import pytest
import torch

from ssl_pretrain.monitoring import collapse_metrics

GENERATOR = torch.Generator().manual_seed(0)


def draw_matrix_with_spectrum(values, num_rows=64):
    """Return a random centered matrix with these singular values, (num_rows, len(values))."""
    columns = torch.randn(num_rows, len(values), generator=GENERATOR, dtype=torch.float64)
    basis, _ = torch.linalg.qr(columns - columns.mean(0))
    return basis * torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_singular_values_equal_those_of_a_decomposition(shape):
    z = torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    torch.testing.assert_close(collapse_metrics.singular_values(z), torch.linalg.svdvals(z))


def test_rankme_of_a_known_spectrum():
    """The entropy of (1/2, 1/4, 1/4) is 1.5 ln 2."""
    values = collapse_metrics.singular_values(draw_matrix_with_spectrum([2.0, 1.0, 1.0]))
    rank = collapse_metrics.effective_rank(values).item()
    assert rank == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-5)


def test_the_effective_rank_of_a_sphere_is_its_dimension():
    z = torch.randn(4096, 16, generator=GENERATOR)
    values = collapse_metrics.singular_values(z)
    assert collapse_metrics.effective_rank(values).item() == pytest.approx(16, rel=0.01)


def test_the_effective_rank_of_a_point_is_one():
    values = collapse_metrics.singular_values(collapse_metrics.centered(torch.ones(64, 16)))
    assert collapse_metrics.effective_rank(values).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_of_a_power_law_is_its_exponent(alpha):
    variances = torch.arange(1, 81, dtype=torch.float64) ** -alpha
    variances[:4] *= 7  # the fit begins after these
    assert collapse_metrics.alpha_req(variances).item() == pytest.approx(alpha, rel=1e-9)
    z = draw_matrix_with_spectrum([float(value) ** 0.5 for value in variances], num_rows=200)
    measured = collapse_metrics.singular_values(z).square()
    assert collapse_metrics.alpha_req(measured).item() == pytest.approx(alpha, rel=1e-6)
    assert math.isnan(collapse_metrics.alpha_req(variances[:5]).item())


def test_standard_deviations_are_one_on_a_sphere_and_zero_at_a_point():
    z = torch.randn(20000, 16, generator=GENERATOR)
    torch.testing.assert_close(
        collapse_metrics.normalized_stds(z), torch.ones(16), atol=0.03, rtol=0
    )
    assert collapse_metrics.normalized_stds(torch.ones(64, 16)).abs().max() < 1e-5
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # the second dimension is dead
    torch.testing.assert_close(collapse_metrics.normalized_stds(axis), torch.tensor([2**0.5, 0.0]))


def test_alignment_is_the_squared_distance_of_unit_vectors():
    z = torch.randn(32, 5, generator=GENERATOR)
    assert collapse_metrics.alignment(z, 3 * z).item() == pytest.approx(0, abs=1e-6)
    assert collapse_metrics.alignment(z, -z).item() == pytest.approx(4, rel=1e-6)
    eye = torch.eye(4)
    assert collapse_metrics.alignment(eye, eye.roll(1, 0)).item() == pytest.approx(2)


def test_uniformity_of_a_point_and_of_orthogonal_vectors():
    assert collapse_metrics.uniformity(torch.ones(8, 3)).item() == pytest.approx(0, abs=1e-6)
    orthogonal = torch.eye(6)  # all pairs have squared distance 2
    assert collapse_metrics.uniformity(orthogonal).item() == pytest.approx(-4, rel=1e-6)


def test_uniformity_of_the_circle():
    """The mean of exp(-4 + 4 cos) over the circle is e^-4 I0(4)."""
    angles = torch.arange(4096, dtype=torch.float64) * 2 * math.pi / 4096
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    expected = torch.special.i0e(torch.tensor(4.0, dtype=torch.float64)).log().item()
    assert collapse_metrics.uniformity(circle).item() == pytest.approx(expected, abs=1e-3)


def test_the_positive_ranks_first_last_or_at_chance():
    eye, collapsed = torch.eye(5), torch.ones(9, 4)
    assert collapse_metrics.positive_rank(eye, eye).item() == 1
    assert collapse_metrics.positive_rank(eye, -eye).item() == 5
    assert collapse_metrics.positive_rank(collapsed, collapsed).item() == pytest.approx(5)


@pytest.mark.parametrize(
    ("assignments", "num_prototypes", "expected"),
    [
        (torch.arange(12) % 4, 4, (1.0, 1.0)),
        (torch.zeros(12, dtype=torch.int64), 4, (0.25, 0.0)),
        (torch.arange(3), 1000, (1.0, 1.0)),  # three embeddings reach at most three prototypes
        (torch.tensor([0, 0, 1, 1]), 4, (0.5, 0.5)),
    ],
)
def test_prototype_usage_and_entropy_of_known_assignments(assignments, num_prototypes, expected):
    usage, entropy = collapse_metrics.prototype_usage_and_entropy(assignments, num_prototypes)
    assert (usage.item(), entropy.item()) == pytest.approx(expected)
