"""LiDAR, the rank of the linear discriminant analysis that tells images apart by their views.

Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures",
ICLR 2024 (arXiv:2312.04000). Each image is a class, and its augmented views are the members. The
covariance of a network that varies with the augmentation has a high rank, too. LiDAR only counts
directions in which images differ by more than their views do.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.frozen.rank_batches import gather_rows
from ssl_pretrain.eval.training_views import build_train_loader
from ssl_pretrain.monitoring.collapse_metrics import effective_rank
from ssl_pretrain.views.mask_recipe import Mask
from ssl_pretrain.views.recipe import Crop

# Added to the within-class covariance, as by OFSkean/information_flow at 703d566f. The paper is not
# known to name a number.
DELTA = 1e-4
NUM_IMAGES: int = 1000
NUM_VIEWS: int = 10
MAX_BATCH_SIZE = 250


def lidar(embeddings: Tensor, delta: float = DELTA) -> float:
    """Return LiDAR, equations 1 to 4 of the paper.

    Args:
        embeddings: Embeddings of the views of each image, (images, views, dim).
        delta: Number that is added to the diagonal of the within-class covariance.

    Returns:
        A number from 1 to the smaller of `dim` and `images - 1`.
    """
    values = embeddings.double()
    num_images, num_views, dim = values.shape
    means = values.mean(dim=1)
    centered_means = means - means.mean(dim=0)
    residuals = (values - means[:, None]).flatten(0, 1)
    between = centered_means.T @ centered_means / num_images
    within = residuals.T @ residuals / (num_images * num_views)
    within += delta * torch.eye(dim, dtype=values.dtype, device=values.device)
    variances, directions = torch.linalg.eigh(within)
    whitening = directions * variances.clamp(min=delta).rsqrt() @ directions.T
    eigenvalues = torch.linalg.eigvalsh(whitening @ between @ whitening).clamp(min=0)
    return effective_rank(eigenvalues).item()


def view_of_run(split: EvaluationSplit) -> Crop:
    """Return the first kind of view of the run's training, without masks."""
    crop = next(iter(split.run.config.views.crops.values()), None)
    if crop is None:
        raise ValueError(
            f"{split.run.path}: LiDAR takes the views of the training, and weights without a run "
            "have none; use eval.knn or eval.linear"
        )
    return replace(crop, count=1, mask=Mask())


def num_measured(num_images: int) -> int:
    """Return how many of the images are measured, which are those of whole batches."""
    batch_size = min(MAX_BATCH_SIZE, num_images)
    return num_images // batch_size * batch_size


def embed_views(
    split: EvaluationSplit, embed: Callable[[Tensor], Tensor], num_views: int = NUM_VIEWS
) -> Tensor:
    """Return the embeddings of several training views of each image.

    The views are those of a run with seed 0, one per epoch. They are the same for any number of
    ranks.

    Args:
        split: Images. Only whole batches are used, so up to a batch of them is left out.
        embed: Function from normalized views to embeddings (n, dim).
        num_views: Number of views per image.

    Returns:
        Embeddings (images, views, dim).
    """
    batch_size, num_images = min(MAX_BATCH_SIZE, len(split)), num_measured(len(split))
    source = split.source.take(split.indices[:num_images])
    rows, indices = [], []
    with build_train_loader(split.run, source, view_of_run(split), batch_size) as loader:
        batches = loader.iterate_from(0)
        for _ in range(num_views * num_images // batch_size):
            batch = next(batches)
            rows.append(embed(batch.views[0]))
            indices.append(batch.indices)
    embeddings = gather_rows(torch.cat(rows))
    # The embeddings of one image are neighbors after a stable sort by image.
    order = np.argsort(gather_rows(torch.cat(indices)).cpu().numpy(), kind="stable")
    ordered = embeddings[torch.from_numpy(order).to(embeddings.device)]
    return ordered.unflatten(0, (len(source), num_views))
