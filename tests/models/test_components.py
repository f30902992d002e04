"""Heads, teachers and queues: updates, masked steps, and agreement of the ranks."""

import math

import pytest
import torch
from conftest import run_ranks
from suites import quick_and_full
from timm.layers import DropPath
from torch import nn

from ssl_pretrain.distributed import process_group
from ssl_pretrain.models.components import Queue, Teacher, check_queue_size, mlp, rising_momentum
from ssl_pretrain.optim.schedules import Progress

pytestmark = pytest.mark.promise


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(3, 4), nn.BatchNorm1d(4), DropPath(0.5), nn.Dropout(0.5)
        self.backbone = nn.Sequential(*layers).double()
        self.projector = nn.Linear(4, 2).double()
        self.teacher = Teacher(backbone=self.backbone, projector=self.projector)


def test_the_teacher_is_the_moving_average_of_parameters_alone():
    student = Student()
    before = {name: p.clone() for name, p in student.teacher.named_parameters()}
    for p in student.backbone.parameters():
        p.data += 1
    student.backbone[1].running_mean += 5
    student.teacher.update(student, 0.9, torch.ones(()))
    for name, p in student.teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * student.get_parameter(name)
        torch.testing.assert_close(p, expected, rtol=1e-14, atol=1e-15)
    assert student.teacher.backbone[1].running_mean.abs().max() == 0
    assert not any(p.requires_grad for p in student.teacher.parameters())


def test_a_masked_step_leaves_the_teacher_as_it_was():
    student = Student()
    before = [p.clone() for p in student.teacher.parameters()]
    for p in student.backbone.parameters():
        p.data += 1
    student.teacher.update(student, 0.9, torch.zeros(()))
    assert all(torch.equal(p, q) for p, q in zip(student.teacher.parameters(), before))


def test_the_teacher_of_a_bfloat16_student_averages_in_float32():
    """In bfloat16, an update smaller than 1/256 of the weight would be rounded away."""
    student = nn.ModuleDict({"layer": nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)})
    nn.init.constant_(student["layer"].weight, 1.0)
    teacher = Teacher(layer=student["layer"])
    nn.init.constant_(student["layer"].weight, 2.0)
    for _ in range(100):
        teacher.update(student, momentum=0.999, step_taken=1.0)
    (weight,) = teacher.parameters()
    assert weight.dtype == torch.float32
    expected = 2.0 - 0.999**100
    torch.testing.assert_close(weight, torch.full((2, 2), expected), rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(torch.ones(1, 2)).dtype == torch.bfloat16


def test_the_teacher_drops_nothing_in_training_mode():
    student, x = Student().train(), torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(student.teacher(x), student.teacher(x))
    assert not torch.equal(student.backbone(x), student.backbone(x))


def test_the_momentum_rises_to_one_by_half_a_cosine():
    momenta = [rising_momentum(Progress(step, 10, 1), 0.99) for step in (0, 5, 10)]
    assert momenta == pytest.approx([0.99, 0.995, 1.0])
    expected = 1 - (1 - 0.996) * (math.cos(math.pi * 0.3) + 1) / 2
    assert rising_momentum(Progress(3, 10, 1), 0.996) == pytest.approx(expected)


def test_the_queue_overwrites_its_oldest_rows():
    queue = Queue(6, 2, random=False)
    for step in range(4):
        queue.push(torch.full((2, 2), float(step + 1)), 1.0)
    expected = [4, 4, 2, 2, 3, 3], 2, 6
    assert (queue.rows[:, 0].tolist(), queue.position, queue.filled) == expected
    queue.push(torch.full((2, 2), float("nan")), torch.zeros(()))  # a masked step
    assert (queue.rows[:, 0].tolist(), queue.position, queue.filled) == expected


def _push_three_batches():
    queue = Queue(12, 1, random=False)
    for step in range(3):
        first = 10.0 * step + 2 * process_group.rank()
        queue.push(torch.tensor([[first], [first + 1]]), 1.0)
    return queue.rows.flatten().tolist()


@pytest.mark.parametrize("world_size", quick_and_full([3], [2, 3]))
def test_the_queue_holds_the_global_batch_in_order_on_every_rank(world_size):
    results = run_ranks(_push_three_batches, world_size=world_size)
    newest = [20.0 + row for row in range(2 * world_size)]
    assert all(rows == results[0] for rows in results)
    start = 2 * (2 * world_size) % 12
    assert results[0][start : start + 2 * world_size] == newest


@pytest.mark.parametrize(
    ("queue_size", "batch_size", "message"),
    [
        (
            65536,
            768,
            "method.queue_size: 65536 is not a multiple of global_batch_size 768; "
            "the nearest multiples are 65280 and 66048",
        ),
        (
            512,
            4096,
            "method.queue_size: 512 is not a multiple of global_batch_size 4096; "
            "the smallest is 4096",
        ),
    ],
)
def test_a_queue_that_the_batch_does_not_fill_is_refused(queue_size, batch_size, message):
    check_queue_size(65536, 8192)
    with pytest.raises(ValueError) as error:
        check_queue_size(queue_size, batch_size)
    assert str(error.value) == message


def layer_types(head):
    return [type(layer).__name__ for layer in head]


def test_simclr_head_is_the_authors():
    head = mlp(512, 2048, 2048, 128, last_batch_norm=True, last_shift=False, init_std=0.01)
    assert layer_types(head) == 2 * ["Linear", "BatchNorm1d", "ReLU"] + ["Linear", "BatchNorm1d"]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    assert head[-1].bias is None  # center=False
    assert head[-1].weight is not None
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    head(torch.randn(4, 512)).sum().backward()


def test_the_default_head_keeps_its_last_bias():
    head = mlp(8, 16, 4)
    assert layer_types(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None
    assert head[-1].bias is not None


def test_widths_must_be_positive():
    with pytest.raises(ValueError) as error:
        mlp(8, 0)
    assert str(error.value) == "mlp: widths must be positive, got in_dim=8, dims=(0,)"


def test_byols_head_has_a_bias_before_the_norm_and_none_at_the_end():
    head = mlp(8, 16, 4, hidden_bias=True, last_bias=False)
    assert head[0].bias is not None
    assert head[-1].bias is None


def test_moco_v3s_head_has_no_bias_and_its_last_norm_no_parameters():
    head = mlp(8, 16, 4, last_batch_norm=True, last_affine=False)
    assert [head[number].bias for number in (0, 3, 4)] == [None] * 3
