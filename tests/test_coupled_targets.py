"""A loss over teacher outputs of the whole batch is the same for any ranks and micro-batches."""

import copy

import coupled_targets
import pytest
import torch
from conftest import run_ranks
from coupled_targets import TEACHER_TEMPERATURE, TEMPERATURE, CoupledTargets, random_batch
from torch.nn import functional as F

from ssl_pretrain import accumulation
from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses import balanced_targets, sinkhorn_offsets
from ssl_pretrain.methods.base import Method
from ssl_pretrain.optim.optimizers import OptimConfig, set_rates
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import build_stepper

pytestmark = pytest.mark.promise

CPU = torch.device("cpu")
ROWS, GROUP = 24, 4
SGD = OptimConfig(name="sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0, weight_decay=0.0)
NAMES = ("class_token", "class_logits", "patch_logits")


def build(koleo_weight=0.1):
    torch.manual_seed(0)
    return CoupledTargets(koleo_weight=koleo_weight).double()


def train(num_micro_batches=1, koleo_weight=0.1, num_steps=3, accumulation="auto", strategy="ddp"):
    """Take steps on this rank, and return losses, logs, the last gradients and the state."""
    method, world_size = build(koleo_weight), process_group.world_size()
    settings = ParallelConfig(
        precision="float64",
        bn_group_images=GROUP,
        accumulation=accumulation,
        strategy=strategy,
    )
    size = ROWS // world_size // num_micro_batches
    example = random_batch(0, ROWS).slice(0, ROWS // size)
    stepper = build_stepper(
        method,
        settings,
        SGD,
        Execution.resolve(settings, CPU),
        micro_batch_size=size,
        global_batch_size=ROWS,
        example=example,
    )
    gradients = {}

    def copy_gradients(*_):
        for name, parameter in method.named_parameters():
            if parameter.grad is not None:
                gradients[name] = full(parameter.grad).clone()

    stepper.optimizer.register_step_pre_hook(copy_gradients)
    for step in range(num_steps):
        progress = Progress(step, 20, 2)
        set_rates(stepper.optimizer, SGD, progress, 10, ROWS)
        batch = random_batch(step, ROWS).slice(process_group.rank(), world_size)
        output = stepper(progress, batch)
    state = {name: full(value).clone() for name, value in method.state_dict().items()}
    return {"logs": output.logs, "gradients": gradients, "state": state}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_equal(actual, expected, tolerance=1e-10):
    for part in ("gradients", "state"):
        assert actual[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            torch.testing.assert_close(
                actual[part][name],
                value,
                rtol=tolerance,
                atol=tolerance,
                msg=f"{name}: {{}}".format,
            )


def plain_sinkhorn(logits):
    """DINOv2's Sinkhorn-Knopp with three iterations, on the rows that count."""
    q = torch.exp(logits / TEACHER_TEMPERATURE).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_loss(method, batch, group):
    """The loss with all logits of the batch at once, image by image."""
    embeddings, targets = in_groups(method, batch, group)
    prototypes, valid = method.teacher.prototypes.weight, targets["valid"]
    q_class = plain_sinkhorn(targets["class_bottleneck"] @ prototypes.T)
    q_patch = plain_sinkhorn(targets["patch_bottleneck"][valid] @ prototypes.T)
    p_class = F.log_softmax(embeddings["class_logits"] / TEMPERATURE, dim=1)
    p_patch = F.log_softmax(embeddings["patch_logits"][valid] / TEMPERATURE, dim=1)
    total = -(q_class * p_class).sum() / ROWS
    image = torch.arange(ROWS)[:, None].expand_as(valid)[valid]
    for row, error in enumerate(-(q_patch * p_patch).sum(1)):
        total = total + error / valid[image[row]].sum() / ROWS
    z = F.normalize(embeddings["class_token"], dim=1)
    for i in range(ROWS):
        nearest = min((j for j in range(ROWS) if j != i), key=lambda j: (z[i] - z[j]).norm().item())
        total = total - method.koleo_weight * ((z[i] - z[nearest]).norm() + 1e-8).log() / ROWS
    return total


def in_groups(method, batch, group):
    """Return embeddings and targets, with batch norm over groups of images."""
    outputs = []
    for k in range(len(batch) // group):
        part = batch.slice(k, len(batch) // group)
        outputs.append((method(part), method.targets(part)))
    return tuple(accumulation.concatenate([pair[i] for pair in outputs]) for i in range(2))


def test_the_gradient_is_that_of_sinkhorn_over_all_images():
    result, method = train(num_steps=1), build()
    plain_loss(method, random_batch(0, ROWS), GROUP).backward()
    expected = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    assert result["gradients"].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("koleo_weight", [0.1, 0.0])
@pytest.mark.parametrize("way", ["auto", "two_passes"])
def test_micro_batches_equal_the_whole_batch(koleo_weight, way):
    whole = train(koleo_weight=koleo_weight)
    parts = train(num_micro_batches=3, koleo_weight=koleo_weight, accumulation=way)
    assert_equal(parts, whole)
    for name in ("loss", "class_error"):
        assert parts["logs"][name].item() == pytest.approx(whole["logs"][name].item(), rel=1e-10)
    if koleo_weight or way == "two_passes":
        assert parts["logs"]["replay_error"] == 0
    else:
        assert "replay_error" not in parts["logs"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    expected = train()
    for rank in run_ranks(train, world_size=world_size):
        assert_equal(rank, expected)


def _train_sharded(num_micro_batches):
    return train(num_micro_batches, strategy="fsdp")


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_sharded_weights_equal_one_process(num_micro_batches):
    for rank in run_ranks(_train_sharded, num_micro_batches, world_size=2):
        assert_equal(rank, train())


def test_coupling_each_micro_batch_alone_would_be_another_loss(monkeypatch):
    whole = train(num_steps=1)
    monkeypatch.setattr(Method, "couple_targets", _couple_each_third)
    parts = train(num_micro_batches=3, num_steps=1)
    name = "backbone.model.conv.weight"
    difference = (parts["gradients"][name] - whole["gradients"][name]).abs().max()
    assert difference > 0.01 * whole["gradients"][name].abs().max()


def _couple_each_third(method, targets):
    rows = {name: value[:8] for name, value in targets.items()}
    return {**targets, "coupled": method.couple(rows)}


def test_the_inserted_rows_pass_on_the_whole_gradient():
    compared = [{"z": torch.randn(2, 3)} for _ in range(3)]
    live = {"z": compared[1]["z"].clone().requires_grad_(), "other": torch.zeros(2)}
    whole = accumulation.insert_rows(live, compared, 1)
    assert torch.equal(whole["z"], torch.cat([part["z"] for part in compared]))
    assert whole["other"] is live["other"]
    whole["z"].square().sum().backward()
    torch.testing.assert_close(live["z"].grad, 3 * 2 * compared[1]["z"])


def test_one_pass_is_refused():
    with pytest.raises(ValueError) as error:
        train(num_micro_batches=3, accumulation="one_pass")
    assert str(error.value) == (
        "parallel.accumulation: one_pass does not train coupled_targets: this loss combines the "
        "targets of the whole batch. Combining those of each micro-batch would give other "
        "targets. Set auto, which computes all targets first, or two_passes"
    )


def test_a_method_without_couple_is_named():
    method = copy.deepcopy(build())
    with pytest.raises(NotImplementedError) as error:
        Method.couple(method, {})
    assert str(error.value) == (
        "coupled_targets: couples is 'targets', so the method must define `couple`"
    )


def random_rows(num_rows=30):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_rows, 4, dtype=torch.float64, generator=generator)
    prototypes = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    return F.normalize(z, dim=1), prototypes, torch.arange(num_rows) % 3 > 0


def test_offsets_give_the_assignments_of_sinkhorn(monkeypatch):
    z, prototypes, valid = random_rows()
    expected = plain_sinkhorn(z[valid] @ prototypes.T)
    for limit in (10**6, 18):  # one tile, and tiles of two rows
        monkeypatch.setattr(balanced_targets, "MAX_LOGITS", limit)
        offsets = sinkhorn_offsets(z, prototypes, valid, temperature=TEACHER_TEMPERATURE)
        q = F.softmax(z[valid] @ prototypes.T / TEACHER_TEMPERATURE + offsets, dim=1)
        torch.testing.assert_close(q, expected, rtol=1e-10, atol=1e-12)


def _offsets_of_rank():
    z, prototypes, valid = random_rows()
    rows = slice(0, 7) if process_group.rank() == 0 else slice(7, 30)
    return sinkhorn_offsets(z[rows], prototypes, valid[rows], temperature=TEACHER_TEMPERATURE)


def test_offsets_are_those_of_all_ranks_with_different_numbers_of_rows():
    z, prototypes, valid = random_rows()
    expected = sinkhorn_offsets(z, prototypes, valid, temperature=TEACHER_TEMPERATURE)
    for offsets in run_ranks(_offsets_of_rank, world_size=2):
        torch.testing.assert_close(offsets, expected, rtol=1e-10, atol=1e-10)


def test_large_logits_do_not_overflow():
    z, prototypes, _ = random_rows()
    offsets = sinkhorn_offsets(100 * z.float(), 10 * prototypes.float(), temperature=0.01)
    assert offsets.isfinite().all()


def test_no_valid_row_gives_offsets_of_zero():
    z, prototypes, valid = random_rows()
    offsets = sinkhorn_offsets(z, prototypes, valid & False, temperature=0.1)
    assert torch.equal(offsets, torch.zeros(9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3, 4), torch.zeros(9, 5)),
            "sinkhorn_offsets: embeddings must be (rows, dim) and prototypes (num_prototypes, "
            "dim), got (3, 4) and (9, 5)",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(9, 4), torch.ones(2, dtype=torch.bool)),
            "sinkhorn_offsets: valid must be (rows,) for 3 rows, got (2,)",
        ),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        sinkhorn_offsets(*arguments, temperature=0.1)
    assert str(error.value) == message


def test_autocast_keeps_normalizers_and_teacher_in_float32():
    method = coupled_targets.CoupledTargets()
    batch = coupled_targets.cast(random_batch(0, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        targets = method.couple_targets(method.targets(batch))
    assert {value.dtype for value in targets["coupled"].values()} == {torch.float32}
    assert {p.dtype for p in method.teacher.parameters()} == {torch.float32}
