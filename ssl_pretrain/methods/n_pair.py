"""Multi-class N-pair loss (Sohn, NeurIPS 2016).

The positive of an anchor competes with the positives of all other pairs. Logits are inner
products instead of cosines, and a penalty keeps the embeddings short. If several pairs belong to
one class, they share the target equally, as in npairs_loss of tensorflow/addons 0.20
(losses/npairs.py).
"""

from dataclasses import dataclass
from typing import Literal

from ssl_pretrain.losses.metric_learning import n_pair_terms
from ssl_pretrain.methods.base import Embeddings, GroupedPairs, LossOutput, MethodConfig
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.schema import setting

SMALL_CONFIG = {"projector_dims": [256, 128]}


@dataclass
class Config(MethodConfig):
    """Configuration of the N-pair loss."""

    name: str = "n_pair"
    pairs: Literal["views", "labels"] = setting(
        "views", "Positives. views: two views of an image. labels: images of one class."
    )
    length_weight: float = setting(
        0.002, "Weight of the penalty, a quarter of the embeddings' mean squared length."
    )
    projector_dims: list[int] = setting([2048, 128], "Widths of the projector's layers.")

    def build(self, backbone: Backbone) -> GroupedPairs:
        """Build the N-pair method on top of a backbone."""
        return NPair(self, backbone)


class NPair(GroupedPairs):
    """N-pair loss on inner products, with a penalty on the length of the embeddings."""

    negatives = "images"

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the N-pair loss plus the weighted penalty on squared lengths, and log both."""
        terms = n_pair_terms(  # the first term is equation 7
            embeddings["z_a"], embeddings["z_b"], targets["groups"]
        )
        loss = terms.weighted_sum(length_weight=self.config.length_weight)
        logs = {"n_pair": terms.n_pair, "squared_length": terms.squared_length / 2}
        return LossOutput(loss, logs)
