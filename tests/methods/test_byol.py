"""BYOL against its authors' arithmetic, google-deepmind/deepmind-research at f5de0ede.

https://github.com/google-deepmind/deepmind-research/blob/f5de0ede/byol/byol_experiment.py
"""

import math

import contract
import pytest
import torch

from ssl_pretrain.losses.distillation import mean_squared_distance
from ssl_pretrain.optim.optimizers import OptimConfig

METHOD = {"hidden_dim": 8, "dim": 4, "momentum": 0.9}
OPTIM = OptimConfig(
    name="lars", base_lr=20.0, warmup_epochs=0.0, weight_decay=1e-4, momentum_convention="popular"
)


def plain_loss(method, images):
    """Both directions of ||q/|q| - z/|z|||^2, image by image. Networks get one view at a time."""
    p = [method.predictor(method.projector(method.backbone(view))) for view in images.views]
    z = [method.teacher.projector(method.teacher.backbone(view)) for view in images.views]
    losses = []
    for i in range(len(images)):
        for prediction, projection in ((p[0][i], z[1][i]), (p[1][i], z[0][i])):
            prediction, projection = contract.unit_rows([prediction, projection])
            losses.append(sum((prediction[d] - projection[d]) ** 2 for d in range(len(prediction))))
    return sum(losses) / len(images)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_one_step_is_the_authors(step):
    method, images = (
        contract.build("byol", teacher_starts="redrawn"),
        contract.random_batch("byol", step),
    )
    expected = contract.copy_method(method)
    contract.take_step(method, OPTIM, images, step)
    progress = step / contract.NUM_STEPS
    lr = 20 * contract.ROWS / 256 * (1 + math.cos(math.pi * progress)) / 2
    contract.apply_plain_step(expected, OPTIM, plain_loss(expected, images), lr)
    # The teacher moves after the optimizer, with this step's momentum.
    momentum = 1 - (1 - 0.9) * (math.cos(math.pi * progress) + 1) / 2
    with torch.no_grad():
        for name, parameter in expected.teacher.named_parameters():
            parameter.copy_(momentum * parameter + (1 - momentum) * expected.get_parameter(name))
    contract.assert_same(method, expected)


def test_the_teacher_keeps_its_own_batch_norm_statistics():
    method, images = contract.build("byol", teacher_starts="redrawn"), contract.random_batch("byol")
    contract.take_step(method, OPTIM, images)
    mean = method.teacher.backbone.model.bn1.running_mean
    assert not torch.allclose(mean, method.backbone.model.bn1.running_mean)
    assert mean.abs().max() > 0


def test_redrawn_weights_are_a_permutation_of_the_students():
    method = contract.build("byol", teacher_starts="redrawn")
    student, teacher = (module.backbone.model.conv1.weight for module in (method, method.teacher))
    assert not torch.equal(student, teacher)
    assert torch.equal(student.flatten().sort()[0], teacher.flatten().sort()[0])


def test_opposite_predictions_cost_four_per_direction():
    z = torch.randn(5, 3)
    assert mean_squared_distance(z, 2 * z).item() == pytest.approx(0, abs=1e-6)
    assert mean_squared_distance(z, -z).item() == pytest.approx(4)


def test_the_heads_have_the_authors_biases():
    method = contract.build("byol")
    for head in (method.projector, method.predictor):
        assert len(head) == 4
        assert head[0].bias is not None
        assert head[-1].bias is None


@pytest.mark.parametrize("step", [0, 3])
def test_without_momentum_the_teacher_has_the_students_weights_after_every_step(step):
    method = contract.build("byol", without_momentum=True, teacher_starts="redrawn")
    contract.take_step(method, OPTIM, contract.random_batch("byol", step), step)
    for name, parameter in method.teacher.named_parameters():
        torch.testing.assert_close(parameter, method.get_parameter(name).detach())
