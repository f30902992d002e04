"""Eigenvalues of features of length 1: cases whose values are known."""

import pytest
import torch

from ssl_pretrain.eval import spectrum


def test_two_orthogonal_directions_and_one_that_all_share():
    first = [[1.0, 1, 0], [1, -1, 0]]
    second = [[1.0, 0, 1], [1, 0, -1]]
    vectors = torch.tensor(3 * first + second)
    # Half of the squared length of each unit vector lies in the shared direction.
    assert spectrum.covariance_spectrum(5 * vectors).tolist() == pytest.approx(
        [6 / 16, 2 / 16, 0], abs=1e-12
    )
    measures = spectrum.spectrum_metrics("z", vectors)
    assert measures["z, top-5 of all"] == pytest.approx(100)
    assert measures["z, rank"] == pytest.approx(0.75**-0.75 * 0.25**-0.25)
    assert measures["z, variance"] == pytest.approx(50)


def test_directions_drawn_uniformly():
    vectors = torch.randn(20000, 20, generator=torch.Generator().manual_seed(0))
    measures = spectrum.spectrum_metrics("z", vectors)
    assert measures["z, top-5 of all"] == pytest.approx(25, abs=2)
    assert measures["z, variance"] == pytest.approx(100, abs=0.1)


def test_a_single_point_has_no_variance():
    assert spectrum.spectrum_metrics("z", torch.ones(10, 4))["z, variance"] == pytest.approx(
        0, abs=1e-9
    )
