"""SigLIP: whole steps against open_clip, and its scale and bias."""

import math

import contract
import open_clip_steps
import pytest
import small_texts
from test_clip import CONSTANT_RATE

from ssl_pretrain.methods import siglip
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

METHOD = {"dim": 6}
OPTIM = OptimConfig(
    name="adamw", base_lr=0.01, lr_scaling="none", weight_decay=1e-4, betas=[0.9, 0.95]
)
VIEWS = (8,)
TEXT_ENCODER = small_texts.build_text_encoder
TEXTS = small_texts.random_texts


def test_three_whole_steps_equal_those_of_the_authors():
    method = open_clip_steps.build_method(siglip.Config(dim=open_clip_steps.DIM))
    reference = open_clip_steps.OpenClip(method, CONSTANT_RATE)
    stepper = open_clip_steps.build_stepper(method, CONSTANT_RATE)
    for step in range(3):
        batch = open_clip_steps.random_batch(step)
        expected = reference.take_step(batch, limits_scale=False)
        logs = stepper(Progress(step, 1000, 100), batch).logs
        assert logs["loss"].item() == pytest.approx(expected, rel=1e-10)
    # The gradient of the bias of the attention keys is zero. Adam divides its rounding errors.
    weights = open_clip_steps.in_open_clips_names(method)
    contract.assert_same(weights, reference.weights(), atol=1e-10)


def test_scale_and_bias_start_as_in_the_paper():
    method = contract.build("siglip")
    assert method.logit_scale.item() == pytest.approx(math.log(10))
    assert method.logit_bias.item() == -10
