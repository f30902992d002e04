"""CLIP (Radford et al., ICML 2021, arXiv:2103.00020) and LiT (Zhai et al., CVPR 2022).

An image attracts its caption, and the other images and captions of the global batch are negatives,
in both directions. Initialization, scale and its limits follow mlfoundations/open_clip 3.3.0
(model.py, loss.py, train.py). LiT (arXiv:2111.07991) is CLIP with a frozen image tower.
"""

import math
from dataclasses import dataclass

import torch

from ssl_pretrain.distributed import collectives
from ssl_pretrain.losses import contrastive
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method
from ssl_pretrain.methods.image_text_pairs import ImageTextConfig, ImageTextPairs, shared_logs
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.models.text_encoders import TextEncoder
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.schema import DIMENSIONLESS, setting

SMALL_CONFIG = {"dim": 64}
SMALLEST_LOG_SCALE = 0.0  # open_clip keeps the scale at 1 or above


@dataclass
class Config(ImageTextConfig):
    """Configuration of CLIP."""

    name: str = "clip"
    temperature: float = setting(
        0.07, "Initial value of the learned divisor of the cosine similarities."
    )
    max_scale: float = setting(
        100.0,
        "Largest scale of the cosine similarities, 1 / temperature.",
        minimum=1,
        unit=DIMENSIONLESS,
    )

    def build_with_texts(self, backbone: Backbone, text_encoder: TextEncoder) -> Method:
        """Build CLIP on top of a backbone and a text encoder."""
        return CLIP(self, backbone, text_encoder)


class CLIP(ImageTextPairs):
    """Contrastive learning of images and their texts, with a learned temperature."""

    def __init__(self, config: Config, backbone: Backbone, text_encoder: TextEncoder):
        super().__init__(config, backbone, text_encoder, 1 / config.temperature)

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean of the cross entropies from images to texts and from texts to images."""
        z_a, z_b = embeddings["z_a"], embeddings["z_b"]
        loss = contrastive.image_text(z_a, z_b, embeddings["logit_scale"])
        return LossOutput(loss, {"image_text": loss, **shared_logs(embeddings)})

    @torch.no_grad()
    def after_step(self, progress: Progress, embeddings: Embeddings, targets: Embeddings) -> None:
        """Limit the scale, as open_clip does after each step of the optimizer."""
        (log_scale,) = collectives.local_tensors([self.logit_scale])
        limited = log_scale.clamp(SMALLEST_LOG_SCALE, math.log(self.config.max_scale))
        log_scale.copy_(self.if_step_taken(limited, log_scale))
