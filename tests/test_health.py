"""Health against closed forms, and one process against three ranks."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain import distributed, health
from ssl_pretrain.health import HealthConfig


def measured(z):
    return {name: value.item() for name, value in health.measure({"z": z}, HealthConfig()).items()}


def test_a_collapsed_batch_has_no_spread_and_rank_one():
    found = measured(torch.ones(64, 16))
    assert found["embedding_std"] == pytest.approx(0, abs=1e-6) and found["effective_rank"] == pytest.approx(1, abs=1e-3)


def test_a_uniform_sphere_has_spread_one_and_full_rank():
    z = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    found = measured(z)
    assert found["embedding_std"] == pytest.approx(1, abs=0.02) and found["effective_rank"] == pytest.approx(16, rel=0.01)


def test_a_known_spectrum():
    """Singular values 2, 1, 1: the entropy of (1/2, 1/4, 1/4) is 1.5 ln 2."""
    assert measured(torch.diag(torch.tensor([2.0, 1.0, 1.0])))["effective_rank"] == pytest.approx(math.exp(1.5 * math.log(2)), rel=1e-4)


def test_broken_embeddings_measure_as_not_a_number():
    assert all(math.isnan(value) for value in measured(torch.full((4, 3), float("inf"))).values())


def test_measured_when_due():
    z = {"z": torch.eye(3)}
    assert health.at(3, z, HealthConfig(every_steps=2)) == health.at(4, z, HealthConfig(every_steps=0)) == {}
    assert health.at(4, z, HealthConfig(every_steps=2)).keys() == {"embedding_std", "effective_rank"}


def _own_rows(z):
    share = len(z) // distributed.world_size()
    return measured(z[distributed.rank() * share : (distributed.rank() + 1) * share])


def test_three_ranks_measure_what_one_does():
    z = torch.randn(24, 5, generator=torch.Generator().manual_seed(1))
    for found in run_ranks(_own_rows, z, world_size=3):
        assert found == pytest.approx(measured(z), rel=1e-5)
