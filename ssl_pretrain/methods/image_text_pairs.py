"""Base class of CLIP and SigLIP: two towers that embed images and texts in one space."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ssl_pretrain.losses import similarity
from ssl_pretrain.methods.base import Embeddings, Method, TextMethodConfig
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch


@dataclass
class ImageTextConfig(TextMethodConfig):
    """Fields that the configurations of CLIP and SigLIP share."""

    dim: int = setting(512, "Width of the space that images and texts share.")
    image_tower: Literal["trained", "frozen"] = setting(
        "trained",
        "trained: train the backbone. frozen: keep its weights and batch norm statistics, as in "
        "LiT. It needs a pretrained network (backbone.init).",
    )

    def check(self, run: Any, world_size: int) -> None:
        """Raise ValueError if a random image tower would stay random."""
        if self.image_tower == "frozen" and run.backbone.init == "random":
            raise ValueError(
                "method.image_tower: frozen keeps the weights of the backbone, and "
                "backbone.init=random has nothing to keep; set backbone.init to a run, a file of "
                "weights or timm:<tag>"
            )


class ImageTextPairs(Method):
    """A method that compares the embeddings of images with those of their texts.

    A linear layer without bias maps the features of either tower to the shared space. Its weights
    have the standard deviation width^-0.5, as in CLIP.

    Args:
        config: Configuration of the method.
        backbone: The image tower.
        text_encoder: The text tower.
        initial_scale: Initial value of the scale of the cosine similarities.
    """

    couples = "embeddings"
    negatives = "images"

    def __init__(
        self,
        config: ImageTextConfig,
        backbone: Backbone,
        text_encoder: TextEncoder,
        initial_scale: float,
    ):
        super().__init__(config, backbone)
        self.text_encoder = text_encoder
        self.image_projection = _projection(backbone.feature_dim, config.dim)
        self.text_projection = _projection(text_encoder.feature_dim, config.dim)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(initial_scale)))
        self.image_tower_is_frozen = config.image_tower == "frozen"
        self.backbone.requires_grad_(not self.image_tower_is_frozen)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts, except that a frozen backbone keeps its statistics."""
        super().train(mode)
        if self.image_tower_is_frozen:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of images and texts, (local_batch, dim), and one scale per image.

        All images have the same scale. One value per image lets the step split it like embeddings.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image_tower_is_frozen):
            features = self.backbone(self.single_view(batch))
        text = self.text(batch)
        return {
            "z_a": self.image_projection(features),
            "z_b": self.text_projection(self.text_encoder(text.ids, text.valid)),
            "logit_scale": self.logit_scale.exp().expand(len(batch)),
        }


def _projection(width: int, dim: int) -> nn.Linear:
    layer = nn.Linear(width, dim, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer


def shared_logs(embeddings: Embeddings) -> dict[str, Tensor]:
    """Return the scale, and the mean cosine similarity of an image and its text."""
    z_a, z_b = embeddings["z_a"].detach(), embeddings["z_b"].detach()
    return {
        "logit_scale": embeddings["logit_scale"].detach().mean(),
        "positive_cosine": similarity.mean_cosine(z_a, z_b),
    }
