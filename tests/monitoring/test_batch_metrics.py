"""Collapse metrics of one batch, on one rank and on several."""

import math

import pytest
import torch
from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import Monitored
from ssl_pretrain.monitoring import collapse_metrics

NUM_ROWS, NUM_PROTOTYPES = 24, 7


def measure(embeddings, features=None, **options):
    monitored = Monitored(embeddings, **options)
    scalars, _ = collapse_metrics.measure(monitored, features, max_rows=NUM_ROWS)
    return {name: value.item() for name, value in scalars.items()}


def test_a_collapsed_batch_shows_in_every_metric():
    z = torch.ones(NUM_ROWS, 8)
    assignments = torch.zeros(NUM_ROWS, dtype=torch.int64)
    metrics = measure(z, pair=(z, z), features=z, assignments=assignments, num_prototypes=100)
    zero_metrics = (
        "embedding_std",
        "embedding_std_min",
        "embedding_scale",
        "uniformity",
        "alignment",
        "prototype_entropy",
    )
    for name in zero_metrics:
        assert metrics[name] == pytest.approx(0, abs=1e-5), name
    assert metrics["rankme"] == pytest.approx(1, abs=1e-4)
    assert metrics["effective_rank_centered"] == pytest.approx(1, abs=1e-4)
    assert metrics["rank_share"] == pytest.approx(1 / 8, abs=1e-4)
    assert metrics["pair_cosine"] == pytest.approx(1)
    assert metrics["positive_rank"] == pytest.approx(12.5)
    assert metrics["prototype_usage"] == pytest.approx(1 / NUM_ROWS)


def test_gaussianity_separates_normal_embeddings_from_collapsed_ones():
    z = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))

    def gaussianity(z):
        monitored = Monitored(z, target_is_gaussian=True)
        return collapse_metrics.measure(monitored)[0]["gaussianity"].item()

    assert gaussianity(z) == pytest.approx(1, abs=0.02)
    assert gaussianity(torch.zeros_like(z)) == pytest.approx(0, abs=1e-6)
    assert gaussianity(0.05 * z) < 0.02  # shrunk
    assert gaussianity(20 * z) < -2  # grown
    assert gaussianity(z * torch.eye(16)[0]) < 0.25  # one direction left
    assert gaussianity(z[:1].expand(512, 16)) < -0.5  # one point that is not 0
    assert "gaussianity" not in measure(z)


def test_metrics_of_non_finite_embeddings_are_nan():
    metrics = measure(torch.full((4, 3), float("inf")))
    assert metrics and all(math.isnan(value) for value in metrics.values())


def test_a_batch_without_a_pair_has_no_pair_metrics():
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert "alignment" not in measure(z)
    assert measure(z, pair=(z, z))["pair_cosine"] == pytest.approx(1, abs=1e-5)


def _measure_local_rows(z_a, z_b, features, assignments):
    """Measure the batch rows of this rank."""
    num_rows = NUM_ROWS // process_group.world_size()
    rows = slice(process_group.rank() * num_rows, (process_group.rank() + 1) * num_rows)
    return measure(
        z_a[rows],
        pair=(z_a[rows], z_b[rows]),
        features=features[rows],
        assignments=assignments[rows],
        num_prototypes=NUM_PROTOTYPES,
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_agree_with_one_process(world_size):
    generator = torch.Generator().manual_seed(1)
    z_a, noise = torch.randn(2, NUM_ROWS, 5, generator=generator, dtype=torch.float64)
    features = torch.randn(NUM_ROWS, 9, generator=generator, dtype=torch.float64)
    batch = (z_a, z_a + 0.3 * noise, features, torch.arange(NUM_ROWS) % NUM_PROTOTYPES)
    expected = _measure_local_rows(*batch)
    assert len(expected) == 16
    for metrics in run_ranks(_measure_local_rows, *batch, world_size=world_size):
        assert metrics == pytest.approx(expected, rel=1e-9)
