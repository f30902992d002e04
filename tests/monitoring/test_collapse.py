"""The monitor: what it finds in a batch over all ranks, that the training does not notice, and when it raises an alarm."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.checkpoint import state as checkpoint
from ssl_pretrain.distributed import process_group
from ssl_pretrain.models.teacher import Teacher
from ssl_pretrain.monitoring import collapse
from ssl_pretrain.monitoring.collapse import Collapsed, HealthConfig, Monitor
from ssl_pretrain.monitoring.collapse_alerts import RULES, Alarms
from ssl_pretrain.train import train

SETTINGS = HealthConfig(every_steps=2, max_rows=24)


def measured(embeddings, features=None, num_prototypes=None):
    found, _ = collapse.measure(embeddings, features, SETTINGS, num_prototypes)
    return {name: value.item() for name, value in found.items()}


def batch(rows=24):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return {
        "z_a": z,
        "z_b": z + 0.3 * torch.randn(rows, 5, generator=generator, dtype=torch.float64),
        "target_assigned": torch.arange(rows) % 7,
    }, torch.randn(rows, 9, generator=generator, dtype=torch.float64)


def test_a_collapsed_batch_shows_in_every_measure():
    same = torch.ones(24, 8)
    found = measured(
        {"z_a": same, "z_b": same, "assigned": torch.zeros(24, dtype=torch.int64)},
        same,
        num_prototypes=100,
    )
    assert found["rankme"] == pytest.approx(1, abs=1e-4) and found[
        "effective_rank_centered"
    ] == pytest.approx(1, abs=1e-4)
    for zero in (
        "embedding_std",
        "embedding_std_min",
        "embedding_scale",
        "uniformity",
        "alignment",
        "prototype_entropy",
    ):
        assert found[zero] == pytest.approx(0, abs=1e-5), zero
    assert found["pair_cosine"] == pytest.approx(1) and found["positive_rank"] == pytest.approx(
        12.5
    )
    assert found["rank_share"] == pytest.approx(1 / 8, abs=1e-4) and found[
        "prototype_usage"
    ] == pytest.approx(1 / 24)


def test_broken_embeddings_measure_as_not_a_number():
    assert all(
        math.isnan(value) for value in measured({"z": torch.full((4, 3), float("inf"))}).values()
    )


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ({"queries": 1, "target_keys": 1}, True),
        ({"p_a": 1, "p_b": 1, "target_z_a": 1, "target_z_b": 1}, True),
        ({"z": 1}, False),
    ],
)
def test_pairs_are_found_whatever_a_method_calls_them(embeddings, expected):
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = measured(dict.fromkeys(embeddings, z))
    assert ("alignment" in found) is expected and (
        not expected or found["pair_cosine"] == pytest.approx(1, abs=1e-5)
    )


def _share_of(embeddings, features):
    share = len(features) // process_group.world_size()
    own = slice(process_group.rank() * share, (process_group.rank() + 1) * share)
    return measured({name: z[own] for name, z in embeddings.items()}, features[own], 7)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_measure_what_one_process_does(world_size):
    embeddings, features = batch()
    alone = _share_of(embeddings, features)
    assert len(alone) == 16
    for found in run_ranks(_share_of, embeddings, features, world_size=world_size):
        assert found == pytest.approx(alone, rel=1e-9)


class Student(nn.Module):
    """Two parts and a teacher of one of them; every weight moves by a known amount."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.backbone, self.projector = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.teacher = Teacher(backbone=self.backbone)
        for parameter in (self.backbone.weight, self.projector.weight):
            nn.init.ones_(parameter)
        nn.init.constant_(self.teacher.backbone.weight, 0.5)

    def forward(self, x):
        return self.projector(self.backbone(x))


def monitored(**settings):
    student = Student()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    alerts = []
    return (
        student,
        optimizer,
        Monitor(
            HealthConfig(every_steps=2, **settings),
            student,
            optimizer,
            0,
            None,
            lambda *alert: alerts.append(alert),
        ),
        alerts,
    )


def take(student, optimizer, gradient=1.0):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    z = student(x)
    for parameter in (student.backbone.weight, student.projector.weight):
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return {"z": z}


def test_measured_when_due_and_never_else():
    student, optimizer, monitor, _ = monitored()
    assert monitor.at(1, take(student, optimizer)) == {} and not monitor._before
    found = monitor.at(2, take(student, optimizer))
    assert {
        "rankme",
        "feature_rank_centered",
        "gradient_norm_backbone",
        "update_ratio_projector",
        "plots",
    } <= found.keys()
    assert monitor.at(3, take(student, optimizer)) == {}
    assert not student.backbone._forward_hooks or monitor.due(4)


def test_gradients_updates_and_the_teacher_by_hand():
    student, optimizer, monitor, _ = monitored()
    monitor.at(1, take(student, optimizer))  # weights are now 0.9
    found = monitor.at(2, take(student, optimizer, gradient=2.0))
    assert found["gradient_norm_backbone"] == pytest.approx(2 * 12**0.5) and found[
        "gradient_norm_projector"
    ] == pytest.approx(2 * 8**0.5)
    assert found["update_ratio_backbone"] == pytest.approx(0.2 / 0.9, rel=1e-5)
    assert found["teacher_distance"] == pytest.approx(
        (0.7 - 0.5) / 0.7, rel=1e-5
    )  # weights are now 0.7


def test_a_watched_run_is_bit_for_bit_one_that_is_not(tmp_path):
    path = tiny.config(tmp_path)
    weights = []
    for every in (1, 0):
        output = tmp_path / f"every_{every}"
        train(
            config.load(path, [f"health.every_steps={every}", f"output={output}"]),
            torch.device("cpu"),
            4,
        )
        weights.append(checkpoint.read(checkpoint.newest(output))[1])
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_stop_ends_the_run_and_warn_does_not():
    for on_collapse in ("warn", "stop"):
        _, _, monitor, alerts = monitored(on_collapse=on_collapse)
        for number, std in enumerate([0.4, 0.15], start=1):
            monitor._judge(2 * number, {"embedding_std": std})
        if on_collapse == "stop":
            with pytest.raises(
                Collapsed,
                match=r"step 6: .* embedding_std is 0.15, it was 0.4: the embeddings of different images have moved",
            ):
                monitor._judge(6, {"embedding_std": 0.15})
        else:
            monitor._judge(6, {"embedding_std": 0.15})
        assert [title for title, _ in alerts] == ["collapse"]


def rings(key, values, every=50, **others):
    alarms = Alarms([])
    return [
        (step, alarm.title)
        for step, value in enumerate(values)
        for alarm in alarms.judge(step * every, {key: value, **others})
    ]


@pytest.mark.parametrize("rule", RULES, ids=[rule.title for rule in RULES])
def test_an_alarm_needs_a_fall_twice_in_a_row_and_rings_once(rule):
    good, bad = 1.5 * rule.bad / rule.fell, rule.bad * 0.8
    assert rings(rule.key, [good, bad, bad, bad, bad]) == [(2, rule.title)]
    assert rings(rule.key, [good, bad, good, bad, good]) == []
    assert rings(rule.key, [good, good * 1e-3]) == [(1, rule.title)]  # so far that once is enough
    assert (
        bool(rings(rule.key, [good, bad, bad], positive_chance=0.4)) is not rule.confused
    )  # views still find each other
    assert rings(rule.key, [good, bad, bad], positive_chance=0.9) == [(2, rule.title)]
    assert rings(rule.key, [good, bad, bad, good, bad, bad]) == [(2, rule.title), (5, rule.title)]
    assert rings(rule.key, [good, math.nan, math.nan, math.nan]) == []


def test_a_run_may_begin_together_for_a_while_but_not_for_ever():
    assert rings("embedding_std", [0.05] * 15 + [0.1, 0.3, 0.8, 0.9]) == []
    ((step, title),) = rings("embedding_std", [0.05] * 40)
    assert (step * 50, title) == (1000, "collapse")


def test_a_resumed_run_remembers_better_days():
    past = [{"step": 50, "embedding_std": 0.5}, {"step": 100, "embedding_std": 0.4, "loss": 1.0}]
    assert [
        len(Alarms(past).judge(150, {"embedding_std": 0.15})),
        len(
            Alarms([*past, {"step": 125, "embedding_std": 0.15}]).judge(
                150, {"embedding_std": 0.15}
            )
        ),
    ] == [0, 1]
