"""The collapse monitor, which measures a run without changing it."""

import pytest
import tiny
import torch
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.checkpoint.tensor_files import read_checkpoint
from ssl_pretrain.methods.base import Monitored
from ssl_pretrain.models.components import Teacher
from ssl_pretrain.monitoring.collapse import CollapseError, CollapseMonitor, HealthConfig
from ssl_pretrain.train import train


class Student(nn.Module):
    """Two modules and a teacher of one of them. Every weight moves by a known amount."""

    def __init__(self):
        super().__init__()
        self.backbone, self.projector = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.teacher = Teacher(backbone=self.backbone)
        for parameter in (self.backbone.weight, self.projector.weight):
            nn.init.ones_(parameter)
        nn.init.constant_(self.teacher.backbone.weight, 0.5)

    def forward(self, x):
        return self.projector(self.backbone(x))

    def monitored(self, embeddings, targets):
        return Monitored(embeddings["z"])


class Run:
    """A student, its optimizer and its monitor, which is due every second step."""

    def __init__(self, **settings):
        self.student = Student()
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)
        self.alerts = []
        health = HealthConfig(every_steps=2, **settings)
        self.monitor = CollapseMonitor(
            health, self.student, self.optimizer, 0, None, lambda *alert: self.alerts.append(alert)
        )

    def step(self, number, gradient=1.0):
        z = self.student(torch.randn(8, 3, generator=torch.Generator().manual_seed(2)))
        for parameter in (self.student.backbone.weight, self.student.projector.weight):
            parameter.grad = torch.full_like(parameter, gradient)
        self.optimizer.step()
        return self.monitor.measure(number, {"z": z}, {})


def test_only_due_steps_are_measured():
    run = Run()
    assert run.step(1).metrics == {} and not run.monitor._network._old_parameters
    measurements = run.step(2)
    expected = {"rankme", "feature_rank_centered", "gradient_norm_backbone"}
    assert expected | {"update_ratio_projector"} <= measurements.metrics.keys()
    assert {"spectrum_index", "spectrum", "deviations"} == measurements.curves.keys()
    assert run.step(3).metrics == {}


def test_hooks_are_only_registered_for_due_steps():
    run = Run()
    assert not run.student.backbone._forward_hooks  # step 1
    run.step(1)
    assert run.student.backbone._forward_hooks  # step 2


def test_gradients_updates_and_teacher_distance_equal_those_computed_by_hand():
    run = Run()
    run.step(1)  # the weights are now 0.9
    metrics = run.step(2, gradient=2.0).metrics  # and now 0.7
    assert metrics["gradient_norm_backbone"] == pytest.approx(2 * 12**0.5)
    assert metrics["gradient_norm_projector"] == pytest.approx(2 * 8**0.5)
    assert metrics["update_ratio_backbone"] == pytest.approx(0.2 / 0.9, rel=1e-5)
    assert metrics["teacher_distance"] == pytest.approx((0.7 - 0.5) / 0.7, rel=1e-5)


def test_a_monitored_run_has_the_same_weights_bit_for_bit(tmp_path):
    path = tiny.write_config(tmp_path)
    weights = []
    for every_steps in (1, 0):
        output = tmp_path / f"every_{every_steps}"
        overrides = [f"health.every_steps={every_steps}", f"output={output}"]
        train(config.load(path, overrides), torch.device("cpu"), 4)
        weights.append(read_checkpoint(newest_checkpoint(output))[1])
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_an_alert_ends_a_run_that_is_configured_to_stop():
    run = Run(on_collapse="stop")
    run.monitor.check(2, {"embedding_std": 0.4})
    run.monitor.check(4, {"embedding_std": 0.15})
    with pytest.raises(CollapseError) as error:
        run.monitor.check(6, {"embedding_std": 0.15})
    text = str(error.value)
    assert text.startswith("step 6: embedding_std is 0.15, its best was 0.4: the embeddings of ")
    assert text.endswith(" Stopped because health.on_collapse is stop. The checkpoints are intact")
    assert [title for title, _ in run.alerts] == ["collapse"]


def test_an_alert_does_not_end_a_run_that_is_configured_to_warn():
    run = Run(on_collapse="warn")
    for step, value in ((2, 0.4), (4, 0.15), (6, 0.15)):
        run.monitor.check(step, {"embedding_std": value})
    assert [title for title, _ in run.alerts] == ["collapse"]
