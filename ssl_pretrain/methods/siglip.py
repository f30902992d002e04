"""SigLIP (Zhai et al., ICCV 2023, arXiv:2303.15343).

Every pair of an image and a caption is classified by itself: they belong together or not. There is
no softmax over the batch, so text embeddings travel from rank to rank instead of being gathered.
The scale and the bias start at the paper's 10 and -10. The projections are those of CLIP.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ssl_pretrain.losses import sigmoid
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method
from ssl_pretrain.methods.image_text_pairs import ImageTextConfig, ImageTextPairs, shared_logs
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.schema import DIMENSIONLESS, setting
from ssl_pretrain.views.batch import Batch

SMALL_CONFIG = {"dim": 64}


@dataclass
class Config(ImageTextConfig):
    """Configuration of SigLIP."""

    name: str = "siglip"
    temperature: float = setting(
        0.1, "Initial value of the learned divisor of the cosine similarities."
    )
    initial_bias: float = setting(
        -10.0,
        "Initial value of the learned bias of the logits. Almost all pairs are negative.",
        minimum=-1e3,
        maximum=1e3,
        unit=DIMENSIONLESS,
    )

    def build_with_texts(self, backbone: Backbone, text_encoder: TextEncoder) -> Method:
        """Build SigLIP on top of a backbone and a text encoder."""
        return SigLIP(self, backbone, text_encoder)


class SigLIP(ImageTextPairs):
    """Sigmoid loss of all pairs of images and texts, with a learned temperature and bias."""

    def __init__(self, config: Config, backbone: Backbone, text_encoder: TextEncoder):
        super().__init__(config, backbone, text_encoder, 1 / config.temperature)
        self.logit_bias = nn.Parameter(torch.full((1,), config.initial_bias))

    def forward(self, batch: Batch) -> Embeddings:
        """Return the embeddings of images and texts, and one scale and one bias per image."""
        bias = self.logit_bias.expand(len(batch)).clone()  # FSDP frees the memory of parameters
        return super().forward(batch) | {"logit_bias": bias}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the sigmoid loss of all pairs, summed over texts and averaged over images."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        loss = sigmoid.sigmoid_image_text(
            z_a, z_b, embeddings["logit_scale"], embeddings["logit_bias"]
        )
        logs = {"sigmoid": loss, "logit_bias": embeddings["logit_bias"].detach().mean()}
        return LossOutput(loss, logs | shared_logs(embeddings))
