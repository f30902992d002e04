"""SimSiam (Chen and He, CVPR 2021, arXiv:2011.10566).

A predictor and a stop-gradient prevent collapse without a teacher or negatives. The projector, the
predictor and the loss follow facebookresearch/simsiam at a7bc1772 (simsiam/builder.py). The frozen
bias before the last batch norm is left out, because the norm removes it. To give the predictor the
constant learning rate of the paper, set optim.constant_lr_names: [predictor].
"""

from dataclasses import dataclass

from torch import nn

from ssl_pretrain.losses import distillation
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone, mlp
from ssl_pretrain.schema import setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"projector_dims": [256, 256, 256], "predictor_dim": 64}


@dataclass
class Config(MethodConfig):
    """Configuration of SimSiam."""

    name: str = "simsiam"
    projector_dims: list[int] = setting(
        [2048, 2048, 2048], "Widths of the projector's layers. CIFAR-10 recipe: [2048, 2048]."
    )
    predictor_dim: int = setting(
        512, "Width of the predictor's hidden layer, a quarter of its output width."
    )
    without_stop_gradient: bool = setting(
        False, "Ablation: no stop-gradient, which collapses (figure 2 of the paper)."
    )
    without_predictor: bool = setting(
        False, "Omit the predictor. This ablation collapses (table 1 of the paper)."
    )

    def build(self, backbone: Backbone) -> Method:
        """Build SimSiam on top of a backbone."""
        return SimSiam(self, backbone)


class SimSiam(Method):
    """Student with a predictor and a stop-gradient, without a teacher or negatives."""

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.projector = mlp(
            backbone.feature_dim, *config.projector_dims, last_batch_norm=True, last_affine=False
        )
        dim = config.projector_dims[-1]
        self.predictor = (
            nn.Identity() if config.without_predictor else mlp(dim, config.predictor_dim, dim)
        )

    def forward(self, batch: Batch) -> Embeddings:
        """Return both views' predictions and embeddings, all (local_batch, dim).

        The embeddings are detached unless `without_stop_gradient` is set.
        """
        z_a, z_b = (self.projector(self.backbone(view)) for view in self.two_views(batch))
        p_a, p_b = self.predictor(z_a), self.predictor(z_b)
        if not self.config.without_stop_gradient:
            z_a, z_b = z_a.detach(), z_b.detach()
        return {"p_a": p_a, "p_b": p_b, "z_a": z_a, "z_b": z_b}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the negative mean cosine of each prediction with the other view's embedding."""
        loss = distillation.simsiam(  # equation 4
            embeddings["p_a"],
            embeddings["p_b"],
            embeddings["z_a"],
            embeddings["z_b"],
            stop_gradient=not self.config.without_stop_gradient,
        )
        return LossOutput(loss, {"predicted_cosine": -loss})
