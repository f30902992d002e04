"""Save the picture of views that a test makes up."""

import torch

from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import Crop, ViewsConfig


def save_views(logger, views, describe_views):
    """Save views (batch, 3, size, size) as those of the first step, with the descriptions."""
    crops = {f"view_{k}": Crop(count=1, size=view.shape[-1]) for k, view in enumerate(views)}
    numbers = torch.arange(len(views[0]))
    config = ViewsConfig(crops, mean=[0.5] * 3, std=[0.25] * 3)
    logger.save_views(1, Batch(views, numbers, numbers), config, describe_views)
