"""MoCo v3 against its authors' arithmetic, facebookresearch/moco-v3 at c349e6e2.

https://github.com/facebookresearch/moco-v3/blob/c349e6e2/moco/builder.py
"""

import math

import contract
import pytest
import torch

from ssl_pretrain.methods.moco_v3 import Config, sine_cosine_positions
from ssl_pretrain.models.backbones import build as build_backbone
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"hidden_dim": 8, "dim": 4, "momentum": 0.9, "temperature": 0.3}
OPTIM = OptimConfig(
    name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-6, momentum_convention="popular"
)


def plain_loss(method, images):
    z = [method.projector(method.backbone(view)) for view in images.views]
    p = [contract.unit_rows(method.predictor(embeddings)) for embeddings in z]
    teacher = method.teacher
    with torch.no_grad():
        teacher_z = [
            contract.unit_rows(teacher.projector(teacher.backbone(view))) for view in images.views
        ]
    loss = torch.zeros((), dtype=torch.float64)
    for queries, keys in ((p[0], teacher_z[1]), (p[1], teacher_z[0])):
        for i, q in enumerate(queries):
            exps = [torch.exp(q @ k / 0.3) for k in keys]
            loss = loss - torch.log(exps[i] / sum(exps)) / len(queries) * 2 * 0.3
    return loss


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_one_step_is_the_authors(step):
    method, images = contract.build("moco_v3"), contract.random_batch("moco_v3", step)
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step)
    lr = 20 * contract.ROWS / 256 * (1 + math.cos(math.pi * step / contract.NUM_STEPS)) / 2
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), lr)
    # The teacher moves before the keys of the next step, with that step's momentum.
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * (step + 1) / contract.NUM_STEPS)) * 0.1
    with torch.no_grad():
        for name, parameter in expected.teacher.named_parameters():
            parameter.copy_(momentum * parameter + (1 - momentum) * expected.get_parameter(name))
    contract.assert_same(method, expected)


def test_heads_have_no_bias_and_their_last_norm_has_no_parameters():
    method = contract.build("moco_v3", num_projector_layers=3, predictor_last_norm=True)
    assert [len(method.projector), len(method.predictor)] == [8, 5]
    for layer in (*method.projector, *method.predictor):
        assert not isinstance(layer, torch.nn.Linear) or layer.bias is None
    assert method.projector[-1].weight is None
    assert method.predictor[-1].weight is None
    assert contract.build("moco_v3").predictor[-1].bias is None


def build_with_vit():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="test_vit"), 64)
    return Config(hidden_dim=8, dim=4, vit_starts="authors").build(backbone)


def test_a_vit_has_the_authors_initial_weights():
    method = build_with_vit()
    model = method.backbone.model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert model.cls_token.abs().max() < 1e-5
    assert model.pos_embed[0, 0].abs().max() == 0
    qkv = model.blocks[0].attn.qkv.weight
    bound = math.sqrt(6 / (qkv.shape[0] // 3 + qkv.shape[1]))
    assert qkv.abs().max().item() == pytest.approx(bound, rel=1e-2)
    for name, p in model.named_parameters():
        assert torch.equal(p, method.teacher.get_parameter(f"backbone.model.{name}")), name


def test_positions_are_sines_and_cosines_of_both_coordinates():
    positions = sine_cosine_positions(3, 3, 8)[0]
    for patch in range(9):
        waves = [
            wave(x / 10000 ** (j / 2))
            for x in divmod(patch, 3)
            for wave in (math.sin, math.cos)
            for j in (0, 1)
        ]
        assert positions[patch].tolist() == pytest.approx(waves, abs=1e-6)


def test_backbone_args_can_set_twelve_heads():
    config = BackboneConfig(name="vit_small_patch16_224", args={"num_heads": 12, "depth": 1})
    attention = build_backbone(config, 224).model.blocks[0].attn
    assert attention.num_heads == 12
    assert attention.head_dim == 32
