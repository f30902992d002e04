"""LiDAR and RankMe, against slow references and in cases whose values are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from untrained_run import load_in_float32, make_run

from ssl_pretrain.eval import spectrum
from ssl_pretrain.eval.frozen import view_rank
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, open_images


def random_views(num_images=7, num_views=4, dim=5):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(num_images, 1, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_images, num_views, dim, generator=generator, dtype=torch.float64)
    return means + 0.3 * noise * torch.arange(1, dim + 1)


def test_lidar_is_that_of_a_slow_reference_in_loops():
    views, delta = random_views().numpy(), 0.01
    num_images, num_views, dim = views.shape
    means = [sum(views[i]) / num_views for i in range(num_images)]
    center = sum(means) / num_images
    between, within = np.zeros((dim, dim)), delta * np.eye(dim)
    for i in range(num_images):
        between += np.outer(means[i] - center, means[i] - center) / num_images
        for j in range(num_views):
            difference = views[i, j] - means[i]
            within += np.outer(difference, difference) / (num_images * num_views)
    # The whitened matrix has the eigenvalues of within^-1 between.
    eigenvalues = np.linalg.eigvals(np.linalg.inv(within) @ between).real
    shares = [value / sum(abs(eigenvalues)) + 1e-7 for value in eigenvalues]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert view_rank.lidar(torch.from_numpy(views), delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_images", [3, 8])
def test_images_with_orthogonal_means_and_equal_covariances_have_one_rank_less(num_images):
    spread = 0.1 * torch.cat([torch.eye(num_images), -torch.eye(num_images)])
    views = 2 * torch.eye(num_images)[:, None] + spread
    # n orthogonal means span n - 1 directions around their mean, all of them equally far.
    assert view_rank.lidar(views) == pytest.approx(num_images - 1, abs=1e-4)


def test_directions_in_which_only_views_differ_do_not_count():
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(64, 16, 10)
    images[..., 0] = torch.arange(64.0)[:, None]
    images[..., 1:] = torch.randn(64, 1, 9, generator=generator).sign() * 0
    images[..., 1:] += torch.randn(64, 16, 9, generator=generator)
    assert spectrum.spectrum_metrics("z", images.flatten(0, 1)[:, 1:])["z, RankMe"] > 8.5
    assert view_rank.lidar(images) == pytest.approx(1, abs=0.02)


def test_rankme_is_that_of_the_singular_values_of_the_vectors_as_they_are():
    vectors = torch.tensor([[3.0, 0, 0], [0, 1, 0]])  # neither centered nor scaled to length 1
    shares = (0.75 + 1e-7, 0.25 + 1e-7)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert spectrum.spectrum_metrics("z", vectors)["z, RankMe"] == pytest.approx(expected, rel=1e-6)


def test_each_image_gets_its_own_views_and_incomplete_batches_are_not_counted(
    tmp_path, monkeypatch
):
    (tmp_path / "images").mkdir()
    for level in range(20):  # flat images, whose crops are as bright as the image
        image = Image.new("RGB", (12, 12), 3 * (12 * level,))
        image.save(tmp_path / f"images/{level:02d}.png")
    data = ["data.source=folder", f"data.root={tmp_path / 'images'}"]
    run = load_in_float32(make_run(tmp_path / "run", *data))
    split = EvaluationSplit(run, open_images(run, "train")).random_subset(20)
    levels = view_rank.embed_views(split, lambda views: views.mean((1, 2, 3))[:, None], 5)
    assert levels.shape == (20, 5, 1)
    expected = [int(Path(split.source.name(index)).stem) for index in split.indices.tolist()]
    assert np.corrcoef(levels[..., 0].mean(1).numpy(), expected)[0, 1] > 0.9
    monkeypatch.setattr(view_rank, "MAX_BATCH_SIZE", 6)
    levels = view_rank.embed_views(split, lambda views: views.mean((1, 2, 3))[:, None], 2)
    assert len(levels) == view_rank.num_measured(20) == 18


def test_one_view_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        spectrum.evaluate(None, lidar_views=1)
    assert str(error.value) == (
        "--lidar-views 1: one view does not show how views differ; give at least 2, or 0 to leave"
        " LiDAR out"
    )
