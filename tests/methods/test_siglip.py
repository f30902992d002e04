"""SigLIP: whole steps against open_clip, and its scale and bias."""

import math

import contract
import open_clip_steps
import pytest
import small_texts

from ssl_pretrain.methods import siglip
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"dim": 6}
OPTIM = OptimConfig(
    name="adamw", base_lr=0.01, lr_scaling="none", weight_decay=1e-4, betas=[0.9, 0.95]
)
VIEWS = (8,)
TEXTS = small_texts.random_texts


def test_three_whole_steps_equal_those_of_the_authors():
    method = open_clip_steps.build_method(siglip.Config(dim=open_clip_steps.DIM))
    open_clip_steps.assert_three_steps_agree(method, limits_scale=False)


def test_scale_and_bias_start_as_in_the_paper():
    method = contract.build("siglip")
    assert method.logit_scale.item() == pytest.approx(math.log(10))
    assert method.logit_bias.item() == -10
