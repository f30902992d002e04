"""Barlow Twins (Zbontar et al., ICML 2021, arXiv:2103.03230).

The loss pulls the cross-correlation of two views' embeddings toward the identity. Projector and
loss follow facebookresearch/barlowtwins at 8e8d284c (main.py).

In that code the all-reduce of the correlation has no backward pass, so on W ranks the gradient is
1/W of the true one. `gradient_scale: authors` reproduces this. To take the same steps with the true
gradient, multiply optim.weight_decay by W and divide optim.excluded_lr_ratio by W. LARS makes the
steps of adapted weights independent of the gradient's scale, but adds weight decay to the gradient
first. Biases and batch norm are not adapted. The authors' learning rate for those, 0.0048, was used
with W = 16.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses import redundancy
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig, SeparatePairs
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"projector_dims": [512, 512, 512]}


@dataclass
class Config(MethodConfig):
    """Configuration of Barlow Twins."""

    name: str = "barlow_twins"
    projector_dims: list[int] = setting([8192, 8192, 8192], "Widths of the projector's layers.")
    redundancy_weight: float = setting(0.0051, "Weight lambda of the redundancy reduction term.")
    loss_scale: float = setting(
        1.0, "Factor of the loss (0.1 in solo-learn's CIFAR-10 recipe).", unit=DIMENSIONLESS
    )
    gradient_scale: Literal["true", "authors"] = setting(
        "true", "Factor of the gradient, which is 1 for true and 1 / world_size for authors."
    )

    def build(self, backbone: Backbone) -> Method:
        """Build Barlow Twins on top of a backbone."""
        return BarlowTwins(self, backbone)


class BarlowTwins(SeparatePairs):
    """Redundancy reduction by the cross-correlation between the embeddings of two views."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(backbone.feature_dim, *config.projector_dims, last_bias=False)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the invariance plus the weighted redundancy term, and log both."""
        terms = redundancy.barlow_twins_terms(embeddings["z_a"], embeddings["z_b"])
        loss = terms.weighted_sum(redundancy_weight=self.config.redundancy_weight)  # equation 1
        loss = self.config.loss_scale * loss
        if self.config.gradient_scale == "authors":
            loss = divide_gradient(loss, process_group.world_size())
        return LossOutput(loss, terms._asdict())


def divide_gradient(value: Tensor, divisor: int) -> Tensor:
    """Return `value` unchanged, with its gradient divided by `divisor`."""
    scaled = value / divisor
    return scaled + (value - scaled).detach()
