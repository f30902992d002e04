"""Steps of CLIP and SigLIP by open_clip's model, losses and optimizer settings."""

import math
from typing import Any

import contract
import pytest
import small_texts
import timm
import torch
from torch import Tensor

from ssl_pretrain.models.components import Backbone
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper
from ssl_pretrain.views.batch import Batch

NETWORK, SIZE, ROWS, DIM = "test_resnet", 32, 12, 6
CONSTANT_RATE = OptimConfig(
    name="adamw",
    base_lr=0.01,
    lr_scaling="none",
    weight_decay=0.2,
    betas=[0.9, 0.98],
    eps=1e-6,
    warmup_epochs=0,
    schedule="milestones",
    milestones=[1000],
)


def random_batch(step: int) -> Batch:
    """Return seeded noise with texts, in float64."""
    generator = torch.Generator().manual_seed(step)
    view = torch.randn(ROWS, 3, SIZE, SIZE, dtype=torch.float64, generator=generator)
    numbers = torch.arange(ROWS)
    return Batch([view], numbers, numbers, (), small_texts.random_texts(ROWS, step))


def build_method(config: Any) -> Any:
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(NETWORK, num_classes=0))
    return small_texts.build_method(config, backbone).double()


def build_stepper(method: Any, optim: OptimConfig) -> Stepper:
    """Return a stepper of one process in float64, at the base learning rate."""
    settings = ParallelConfig(precision="float64")
    execution = Execution.resolve(settings, torch.device("cpu"))
    optimizer = optimizers.build(optim, method)
    optimizers.set_rates(optimizer, optim, Progress(0, 1000, 100), 10, ROWS)
    return Stepper(method, optimizer, settings, 0, ROWS, ROWS, optim, execution)


def assert_three_steps_agree(method: Any, limits_scale: bool) -> None:
    """Take three steps with the method and with open_clip, and compare losses and weights.

    Args:
        method: CLIP or SigLIP.
        limits_scale: True if the scale is limited after each step.
    """
    reference, stepper = OpenClip(method, CONSTANT_RATE), build_stepper(method, CONSTANT_RATE)
    for step in range(3):
        batch = random_batch(step)
        expected = reference.take_step(batch, limits_scale)
        logs = stepper(Progress(step, 1000, 100), batch).logs
        assert logs["loss"].item() == pytest.approx(expected, rel=1e-10)
    # The exact gradient of the bias of the attention keys is zero. Adam amplifies its rounding.
    contract.assert_same(in_open_clips_names(method), reference.weights(), atol=1e-10)


def in_open_clips_names(method: Any) -> dict[str, Tensor]:
    """Return the method's weights and buffers under the names of open_clip's CLIP."""
    renamed = {}
    for name, value in method.state_dict().items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif name in ("logit_scale", "logit_bias"):
            renamed[name] = value.squeeze(0)
        else:
            name = name.replace("backbone.model.", "visual.trunk.")
            name = name.replace("image_projection.", "visual.head.proj.")
            renamed[name.replace("text_encoder.model.transformer.", "")] = value
    return renamed


class OpenClip:
    """open_clip's CLIP or SigLIP with the weights of one of our methods, and its optimizer."""

    def __init__(self, method: Any, optim: OptimConfig):
        open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
        self.is_sigmoid = hasattr(method, "logit_bias")
        self.model = open_clip.model.CLIP(
            embed_dim=DIM,
            vision_cfg=open_clip.model.CLIPVisionCfg(
                timm_model_name=NETWORK, timm_pool="", timm_proj="linear", image_size=SIZE
            ),
            text_cfg=open_clip.model.CLIPTextCfg(
                context_length=small_texts.LENGTH,
                vocab_size=small_texts.VOCABULARY_SIZE,
                width=8,
                heads=2,
                layers=2,
            ),
            init_logit_bias=0.0 if self.is_sigmoid else None,
        ).double()
        self.model.load_state_dict(in_open_clips_names(method))
        self.loss = open_clip.loss.SigLipLoss() if self.is_sigmoid else open_clip.loss.ClipLoss()
        parameters = list(self.model.named_parameters())
        excluded = [p for name, p in parameters if is_excluded(name, p)]
        decayed = [p for name, p in parameters if not is_excluded(name, p)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": excluded, "weight_decay": 0.0},
                {"params": decayed, "weight_decay": optim.weight_decay},
            ],
            lr=optim.base_lr,
            betas=tuple(optim.betas),
            eps=optim.eps,
        )

    def take_step(self, batch: Batch, limits_scale: bool) -> float:
        """Take a step and return the loss."""
        self.optimizer.zero_grad()
        outputs = self.model(batch.views[0], batch.texts[0].ids)
        loss = self.loss(*outputs)
        loss.backward()
        self.optimizer.step()
        if limits_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def is_excluded(name: str, parameter: Tensor) -> bool:
    """Return True if open_clip does not decay a parameter."""
    parts = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(part in name for part in parts)
