"""A teacher's weights are cast once per step, without any effect on results."""

import pytest
import torch
from networks import build_case, random_batch, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_pretrain.models.components import Backbone, Teacher
from ssl_pretrain.parallel import weight_casts, wrap
from ssl_pretrain.views.batch import Batch


class CastCounter(TorchDispatchMode):
    """Records the shapes of tensors that are cast to bfloat16 by a kernel each."""

    def __init__(self):
        super().__init__()
        self.shapes = []
        self.num_copies = 0  # calls that cast many tensors at once

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.shapes.append(args[0].shape)
        self.num_copies += function is torch.ops.aten._foreach_copy_.default
        return function(*args, **(kwargs or {}))


def compute_targets(stepper, batch):
    """Return the targets of a batch, the shapes that were cast, and the number of joint copies."""
    with CastCounter() as counter, stepper.execution.forward_context():
        targets = stepper.method.targets(batch)
    return targets, counter.shapes, counter.num_copies


def build_stepper(monkeypatch, name, casts_once):
    with monkeypatch.context() as patch:
        if not casts_once:
            patch.setattr(weight_casts, "cast_once_per_step", lambda method: None)
        stepper, sizes = build_case(name, precision="bfloat16")
    views = stepper.execution.place_views(random_batch(0, sizes).views)
    return stepper, Batch(views, torch.zeros(8), torch.arange(8))


@pytest.mark.parametrize("name", ["moco_v3", "dino"])
def test_targets_are_the_same_with_one_copy_per_step(monkeypatch, name):
    plain, batch = build_stepper(monkeypatch, name, casts_once=False)
    stepper, _ = build_stepper(monkeypatch, name, casts_once=True)
    num_weights = len(weight_casts.castable_weights(stepper.method.teacher))
    assert num_weights > 15
    for expected_copies in (1, 0):  # the second micro-batch of a step copies nothing
        expected, plain_shapes, _ = compute_targets(plain, batch)
        targets, shapes, num_copies = compute_targets(stepper, batch)
        assert len(plain_shapes) - len(shapes) == num_weights * (2 if name == "moco_v3" else 1)
        assert num_copies == expected_copies
        assert [key for key in targets if not torch.equal(targets[key], expected[key])] == []


def test_changed_weights_are_cast_again(monkeypatch):
    stepper, batch = build_stepper(monkeypatch, "moco_v3", casts_once=True)
    method, plain = stepper.method, build_stepper(monkeypatch, "moco_v3", casts_once=False)[0]
    state = {name: value + 0.1 for name, value in method.state_dict().items()}

    def change_by_average():
        for changed in (method, plain.method):
            for parameter in changed.projector.parameters():
                parameter.data.add_(1.0)
            changed.teacher.update(changed, 0.5, torch.ones(()))

    def change_by_loading():
        for changed in (method, plain.method):
            changed.load_state_dict(state)

    previous = compute_targets(stepper, batch)[0]
    for change in (change_by_average, change_by_loading):
        change()
        targets, _, num_copies = compute_targets(stepper, batch)
        assert num_copies == 1
        assert torch.equal(targets["z_a"], compute_targets(plain, batch)[0]["z_a"])
        assert not torch.equal(targets["z_a"], previous["z_a"])
        previous = targets


def test_the_weights_are_back_after_the_forward_pass_and_after_an_error(monkeypatch):
    stepper, batch = build_stepper(monkeypatch, "moco_v3", casts_once=True)
    before = dict(stepper.method.named_parameters())
    compute_targets(stepper, batch)
    with pytest.raises(RuntimeError), stepper.execution.forward_context():
        stepper.method.teacher(torch.zeros(2, 5, 16, 16))  # five channels
    after = dict(stepper.method.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())


def test_twenty_bfloat16_steps_change_no_bit(monkeypatch):
    losses = run("moco_v3", 20, precision="bfloat16")["losses"]
    monkeypatch.setattr(wrap.weight_casts, "cast_once_per_step", lambda method: None)
    assert run("moco_v3", 20, precision="bfloat16")["losses"] == losses


def test_only_weights_that_autocast_rounds_are_cast():
    class Standardized(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight - self.weight.mean())

    network = nn.Sequential(nn.Linear(3, 3), Standardized(3, 3), nn.LayerNorm(3))
    heads = nn.Sequential(nn.Linear(3, 2), nn.utils.spectral_norm(nn.Linear(2, 2, bias=False)))
    teacher = Teacher(backbone=Backbone(network, 3), head=heads)
    names = {module: name for name, module in teacher.named_modules()}
    weights = [f"{names[owner]}.{name}" for owner, name in weight_casts.castable_weights(teacher)]
    assert weights == ["head.0.weight", "head.0.bias"]  # the backbone is not timm's
