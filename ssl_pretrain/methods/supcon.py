"""Supervised contrastive learning (Khosla et al., NeurIPS 2020, arXiv:2004.11362).

All views of a class are positives of each other. Loss and scale follow HobbitLong/SupContrast at
66a8fe53 (losses.py, networks/resnet_big.py). google-research/supcon at 0c1bbe5f differs in the
projector (projection_head.py), whose last layer has no bias.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ssl_pretrain.losses.contrastive import supervised_contrastive
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of SupCon."""

    name: str = "supcon"
    temperature: float = setting(0.1, "Divisor of the cosine similarities.")
    base_temperature: float = setting(
        0.07,
        "The loss is multiplied by temperature / base_temperature. "
        "google-research multiplies by the temperature alone.",
    )
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")
    unit_features: bool = setting(
        False, "Normalize the features before the projector, as google-research does."
    )
    last_bias: bool = setting(
        True, "Use a bias in the projector's last layer. google-research has none."
    )

    def build(self, backbone: Backbone) -> Method:
        """Build SupCon on top of a backbone."""
        return SupCon(self, backbone)


class SupCon(Method):
    """Contrastive learning in which all images of a class are positives of each other."""

    couples = "embeddings"
    negatives = "embeddings"
    needs_labels = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(
            backbone.feature_dim,
            *config.projector_dims,
            batch_norm=False,
            last_bias=config.last_bias,
        )

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of both views from one forward pass, each (local_batch, dim)."""
        features = self.backbone(torch.cat(self.two_views(batch)))  # batch norm sees both views
        if self.config.unit_features:
            features = F.normalize(features)
        z_a, z_b = self.projector(features).chunk(2)
        return {"z_a": z_a, "z_b": z_b}

    @torch.no_grad()
    def targets(self, batch: Batch) -> Embeddings:
        """Return the labels of the images, (local_batch,)."""
        return {"labels": batch.labels}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the supervised contrastive loss times temperature / base_temperature."""
        z_a, z_b, temperature = embeddings["z_a"], embeddings["z_b"], self.config.temperature
        mean_loss = supervised_contrastive(  # equation 2
            z_a, z_b, targets["labels"], temperature=temperature
        )
        loss = mean_loss * temperature / self.config.base_temperature
        return LossOutput(loss, {"supervised_contrastive": mean_loss})
