"""DINO against its authors' arithmetic, facebookresearch/dino at 7c446df5.

https://github.com/facebookresearch/dino/blob/7c446df5/main_dino.py
"""

import math
import weakref

import contract
import pytest
import torch

from ssl_pretrain.methods.dino import Config, temperature_at
from ssl_pretrain.models.backbones import build as build_backbone
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim.optimizers import OptimConfig

VIEWS = (9, 9, 7, 7, 7)
METHOD = {
    "hidden_dim": 8,
    "bottleneck_dim": 4,
    "num_prototypes": 9,
    "momentum": 0.9,
    "freeze_last_layer_epochs": 1,
    "train_norm": True,
    "teacher_temperature": 0.07,
    "teacher_temperature_warmup_epochs": 3,
}
OPTIM = OptimConfig(
    name="adamw",
    base_lr=0.05,
    warmup_epochs=0.0,
    weight_decay=0.04,
    final_weight_decay=0.4,
    clip_norm=0.02,
    clip_by="tensor",
)
SCHEDULED = {"teacher_temperature"}


def plain_loss(method, images, temperature):
    def compute_logits(backbone, head, groups):
        features = torch.cat([backbone(torch.cat(group)) for group in groups])
        z = torch.stack(contract.unit_rows(head.mlp(features)))
        prototypes = torch.stack(contract.unit_rows(head.last_layer.weight))
        prototypes = prototypes * head.last_layer.norm
        return (z @ prototypes.T).split(len(images))

    with torch.no_grad():
        teacher = compute_logits(method.teacher.backbone, method.teacher.head, [images.views[:2]])
        q = [torch.softmax((logits - method.center) / temperature, dim=1) for logits in teacher]
    student = compute_logits(method.backbone, method.head, [images.views[:2], images.views[2:]])
    terms = []
    for t in (0, 1):
        for v in range(5):
            if v != t:
                log_p = torch.log_softmax(student[v] / 0.1, dim=1)
                entropies = [-(q[t][i] * log_p[i]).sum() for i in range(len(images))]
                terms.append(sum(entropies) / len(entropies))
    return sum(terms) / len(terms), torch.cat(teacher).mean(0)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_one_step_is_the_authors(step):
    method, images = contract.build("dino"), contract.random_batch("dino", step)
    temperature = [0.04, 0.04, 0.055, 0.055][step]  # 2 steps per epoch, 3 warmup epochs
    method.teacher_temperature.fill_(temperature)
    method.center.copy_(torch.randn(9))
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step)
    progress = step / contract.NUM_STEPS
    lr = 0.05 * contract.ROWS / 256 * (1 + math.cos(math.pi * progress)) / 2
    decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * progress)) / 2
    loss, mean_logits = plain_loss(expected, images, temperature)
    last_layer = {
        name: p.detach().clone() for name, p in expected.head.last_layer.named_parameters()
    }
    contract.apply_plain_step(expected, OPTIM, loss, lr, decay)
    momentum = 1 + (0.9 - 1) * (1 + math.cos(math.pi * progress)) / 2
    with torch.no_grad():
        if step < 2:  # frozen in the first epoch
            for name, p in expected.head.last_layer.named_parameters():
                p.copy_(last_layer[name])
        for name, p in expected.teacher.named_parameters():
            p.copy_(momentum * p + (1 - momentum) * expected.get_parameter(name))
        expected.center.copy_(0.9 * expected.center + 0.1 * mean_logits)
        next_temperature = [0.04, 0.055, 0.055, 0.07][step]
        expected.teacher_temperature.fill_(next_temperature)
    contract.assert_same(method, expected)


def test_a_class_token_starts_as_in_the_authors_code():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="vit_tiny_patch16_224"), 32)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    assert before["cls_token"].std() < 1e-5  # timm's initialization
    method = Config(num_prototypes=9, vit_starts="authors").build(backbone)
    token = method.backbone.model.cls_token
    assert token.std().item() == pytest.approx(0.02, rel=0.15)
    parameters = method.backbone.model.named_parameters()
    changed = [name for name, p in parameters if not torch.equal(p, before[name])]
    assert changed == ["cls_token"]
    assert torch.equal(token, method.teacher.get_parameter("backbone.model.cls_token"))


def test_the_teachers_temperature_rises_by_epoch():
    config = Config(teacher_temperature=0.07, teacher_temperature_warmup_epochs=30)
    temperatures = [temperature_at(config, epoch) for epoch in (0, 1, 29, 30, 99)]
    assert temperatures == pytest.approx([0.04, 0.04 + 0.03 / 29, 0.07, 0.07, 0.07])
    assert temperature_at(Config(), 0) == 0.04


def test_logits_of_at_most_one_micro_batch_are_held_at_once():
    """The peak is (2 + views) * num_prototypes numbers per image of a micro-batch."""
    outputs, sizes = [], []

    def record_size(module, inputs, output):
        if type(module).__name__ == "NormalizedLinear":
            outputs.append(weakref.ref(output))
            sizes.append(sum(ref().numel() for ref in outputs if ref() is not None))

    handle = torch.nn.modules.module.register_module_forward_hook(record_size)
    try:
        contract.train("dino", steps=1, num_micro_batches=3, group=8)
    finally:
        handle.remove()
    assert len(sizes) >= 6
    assert max(sizes) <= (2 + 5) * 9 * contract.ROWS // 3


def test_the_heads_hidden_layers_may_have_batch_norm():
    head = contract.build("dino", head_batch_norm=True).head
    kinds = [type(layer).__name__ for layer in head.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]


def test_the_teacher_has_no_drop_path_and_local_crops_interpolate_positions():
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="test_vit", drop_path=0.5), 64)
    method = Config(num_prototypes=16, hidden_dim=8, bottleneck_dim=4).build(backbone)
    images = contract.random_batch("dino", rows=2)
    views = [torch.randn(2, 3, size, size) for size in (64, 64, 32)]
    method.train()
    assert method(contract.replace_views(images, views))["logits"].shape == (2, 3, 16)
    first, second = (method.teacher.backbone(views[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(backbone(views[0]), backbone(views[0]))


def test_uniform_outputs_cost_the_log_of_the_number_of_prototypes():
    student = torch.zeros(6, 5, 9, dtype=torch.float64)
    teacher = torch.zeros(6, 2, 9, dtype=torch.float64)
    loss, _ = contract.build("dino").loss({"z": teacher, "logits": student}, {"logits": teacher})
    assert loss.item() == pytest.approx(math.log(9))
