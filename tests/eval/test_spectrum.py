"""Eigenvalues of unit-length features, in cases whose values are known."""

import pytest
import torch

from ssl_pretrain.eval import spectrum


def test_a_shared_and_two_orthogonal_directions_have_the_expected_spectrum():
    first = [[1.0, 1, 0], [1, -1, 0]]
    second = [[1.0, 0, 1], [1, 0, -1]]
    vectors = torch.tensor(3 * first + second)
    # Half of the squared length of each unit vector lies in the shared direction.
    assert spectrum.covariance_spectrum(5 * vectors).tolist() == pytest.approx(
        [6 / 16, 2 / 16, 0], abs=1e-12
    )
    metrics = spectrum.spectrum_metrics("z", vectors)
    assert metrics["z, top-5 of all"] == pytest.approx(100)
    assert metrics["z, rank"] == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert metrics["z, variance"] == pytest.approx(50)


def test_uniformly_drawn_directions_have_a_flat_spectrum():
    vectors = torch.randn(20000, 20, generator=torch.Generator().manual_seed(0))
    metrics = spectrum.spectrum_metrics("z", vectors)
    assert metrics["z, top-5 of all"] == pytest.approx(25, abs=2)
    assert metrics["z, variance"] == pytest.approx(100, abs=0.1)


def test_a_single_point_has_no_variance():
    assert spectrum.spectrum_metrics("z", torch.ones(10, 4))["z, variance"] == pytest.approx(
        0, abs=1e-9
    )
