"""CLIP: whole steps against open_clip, the limits of its scale, and its frozen image tower."""

import math

import contract
import open_clip_steps
import pytest
import small_texts
import torch

from ssl_pretrain.config import RunConfig
from ssl_pretrain.methods import clip
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress

METHOD = {"dim": 6}
OPTIM = OptimConfig(
    name="adamw", base_lr=0.01, lr_scaling="none", weight_decay=0.2, betas=[0.9, 0.98], eps=1e-6
)
VIEWS = (8,)
TEXTS = small_texts.random_texts


def build_clip(**settings):
    return open_clip_steps.build_method(clip.Config(dim=open_clip_steps.DIM, **settings))


def test_three_whole_steps_equal_those_of_the_authors():
    method = build_clip()
    open_clip_steps.assert_three_steps_agree(method, limits_scale=True)


@pytest.mark.parametrize(("log_scale", "limited"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_scale_is_limited_after_each_step(log_scale, limited):
    method = contract.build("clip")
    with torch.no_grad():
        method.logit_scale.fill_(log_scale)
    method.after_step(Progress(0, 10, 5), {}, {})
    assert method.logit_scale.item() == pytest.approx(limited)


def test_a_frozen_image_tower_keeps_its_weights_and_statistics():
    method = contract.build("clip", image_tower="frozen")
    before = {key: value.clone() for key, value in method.state_dict().items()}
    batch = contract.random_batch("clip")
    for step in (4, 5):
        contract.take_step(method, OPTIM, batch, step)
    for key, value in method.state_dict().items():
        moves = not key.startswith("backbone.") and "attn_mask" not in key
        assert torch.equal(value, before[key]) != moves, key


def test_a_frozen_image_tower_needs_no_gradient():
    method = contract.build("clip", image_tower="frozen")
    embeddings = method(contract.random_batch("clip"))
    embeddings["z_a"].sum().backward()
    assert method.image_projection.weight.grad is not None
    groups = optimizers.parameter_groups(OPTIM, method)
    trained = {id(p) for group in groups for p in group["params"]}
    assert not trained & {id(p) for p in method.backbone.parameters()}


def test_several_texts_per_image_are_refused():
    batch = contract.random_batch("clip")
    batch = small_texts.with_texts(batch, batch.texts * 2)
    with pytest.raises(ValueError) as error:
        contract.build("clip")(batch)
    assert str(error.value) == (
        "clip: takes 1 text per item, got 2; give data with one caption per image"
    )


def test_a_frozen_random_image_tower_is_refused():
    config = clip.Config(image_tower="frozen")
    run = RunConfig(method=config)
    with pytest.raises(ValueError) as error:
        config.check(run, 1)
    assert str(error.value) == (
        "method.image_tower: frozen keeps the weights of the backbone, and backbone.init=random "
        "has nothing to keep; set backbone.init to a run, a file of weights or timm:<tag>"
    )
    run.backbone.init = "runs/simclr"
    config.check(run, 1)
