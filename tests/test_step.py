"""Parts of a batch leave the gradient, the statistics and the weights of the whole batch on as many ranks."""

from __future__ import annotations

import pytest
import tiny
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain import config
from ssl_pretrain.build import build_method, build_run_stepper, choose_micro_batch_size
from ssl_pretrain.data import loader
from ssl_pretrain.data.loader import Batch
from ssl_pretrain.distributed import process_group
from ssl_pretrain.methods.base import LossOutput, Method
from ssl_pretrain.models import backbones
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import batch_norm, memory
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.step import Stepper

pytestmark = pytest.mark.promise

CPU = torch.device("cpu")
END = Progress(20, 20, 2)


def _steps(path, overrides, steps=2):
    """Some steps; (gradients of the last, weights and statistics, logs of the last)."""
    settings = config.load(path, overrides)
    config.check(settings, process_group.world_size())
    images_of_all = settings.global_batch_size
    batches = loader.build(
        settings.data, settings.views, seed=0, global_batch_size=images_of_all, device=CPU
    )
    method = build_method(settings)
    stepper = build_run_stepper(method, settings, Execution.resolve(settings.parallel, CPU))
    for step, batch in zip(range(steps), batches.starting_at(0)):
        progress = Progress(step + 2, 20, 2)
        optim.set_rates(stepper.optimizer, settings.optim, progress, settings.epochs, images_of_all)
        logs = stepper(progress, batch).logs
    batches.close()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return gradients, method.state_dict(), {name: value.item() for name, value in logs.items()}


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_parts_on_one_rank_equal_as_many_ranks(tmp_path, drop_path):
    path = tiny.config(tmp_path)
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    _assert_parts_equal_ranks(path, [*overrides, "parallel.precision=float64"], 3, 8)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_parts_on_one_rank_equal_as_many_ranks_as_shipped(tmp_path, drop_path):
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    _assert_parts_equal_ranks(tiny.config(tmp_path), overrides, 3, 8, steps=1, tolerance=1e-4)


@pytest.mark.full
def test_a_batch_of_256_in_eight_parts_equals_eight_ranks(tmp_path):
    overrides = [
        "data.source=digits",
        "data.root=''",
        "global_batch_size=256",
        "parallel.bn_group_images=32",
        "parallel.precision=float64",
    ]
    _assert_parts_equal_ranks(tiny.config(tmp_path), overrides, 8, 32)


def _assert_parts_equal_ranks(path, overrides, world_size, part, steps=2, tolerance=1e-9):
    ranks = run_ranks(_steps, path, overrides, steps, world_size=world_size)
    gradients, state, logs = _steps(path, [*overrides, f"micro_batch_size={part}"], steps)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            ranks[0][0][name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    for name, value in state.items():
        torch.testing.assert_close(
            value,
            ranks[-1][1][name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert (
        logs["replay_error"] == 0.0
    )  # the second pass drew the same drop-path and used the same batch norm groups


def _one_rank_breaks(path):
    """Step 0 whole, step 1 with a NaN pixel on rank 1; what moved in step 1, the counter, and what is said of it."""
    settings = config.load(path, ["parallel.bn_group_images=12"])
    batches = loader.build(settings.data, settings.views, seed=0, global_batch_size=24, device=CPU)
    method = build_method(settings)
    stepper = build_run_stepper(method, settings, Execution.resolve(settings.parallel, CPU))
    stepped = []
    method.after_step = lambda progress, embeddings, targets: stepped.append(float(method.stepped))
    for step, batch in zip(range(2), batches.starting_at(0)):
        progress = Progress(step, 4, 2)
        optim.set_rates(stepper.optimizer, settings.optim, progress, settings.epochs, 24)
        before = {name: value.clone() for name, value in method.state_dict().items()}
        if step == 1 and process_group.rank() == 1:
            batch.views[1][0, 0, 0, 0] = float("nan")
        logs = stepper(progress, batch).logs
    batches.close()
    moved = [
        name
        for name, value in method.state_dict().items()
        if not torch.equal(value, before[name]) and "num_batches" not in name
    ]
    return moved, stepped, logs["skipped_steps"].item(), stepper.describe_bad_embeddings()


@pytest.mark.case(19)
def test_a_broken_batch_moves_nothing_on_any_rank_and_is_named(tmp_path):
    for moved, stepped, skipped, said in run_ranks(
        _one_rank_breaks, tiny.config(tmp_path), world_size=2
    ):
        assert moved == [] and stepped == [1.0, 0.0] and skipped == 1.0
        assert said == "z_a of rank 1 since step 2, z_b of rank 1 since step 2"


def test_one_pass_with_a_coupled_loss_is_refused(tmp_path):
    path = tiny.config(tmp_path)
    with pytest.raises(ValueError) as error:
        _steps(
            path,
            ["parallel.bn_group_images=8", "micro_batch_size=8", "parallel.accumulation=one_pass"],
        )
    assert str(error.value) == (
        "parallel.accumulation: one_pass does not train simclr: this loss compares images across "
        "the whole batch. Summing the losses of micro-batches would drop the pairs between them. "
        "Set auto or two_passes, which keep all pairs"
    )
    _steps(
        path, ["parallel.accumulation=one_pass"]
    )  # the whole batch is one part: nothing to refuse


def test_auto_takes_the_largest_part_that_fits(tmp_path, monkeypatch, capsys):
    settings = config.load(
        tiny.config(tmp_path), ["parallel.bn_group_images=4", "micro_batch_size=auto"]
    )
    method = build_method(settings)
    assert (
        choose_micro_batch_size(method, settings, Execution.resolve(settings.parallel, CPU)) == 24
    )
    assert "micro_batch_size: auto took 24 of 24 images at once (" in capsys.readouterr().out
    monkeypatch.setattr(memory, "peak", lambda function, device: function() or 0)
    costs = {8: 100, 24: 260}
    part, said = memory.largest_micro_batch(
        24, 4, lambda images: costs[images] * memory.GIB, 200 * memory.GIB
    )
    assert part == 12 and said == "20.00 GiB + 10240.00 MiB per image, 200.0 GiB free"
    with pytest.raises(ValueError) as error:
        memory.largest_micro_batch(
            24, 4, lambda images: costs[images] * memory.GIB, 60 * memory.GIB
        )
    assert str(error.value) == (
        "micro_batch_size: auto: a micro-batch of 4 images does not fit (20.00 GiB + 10240.00 MiB per image, 60.0 GiB free); "
        "take a smaller crop size or backbone, a smaller parallel.bn_group_images, or more ranks"
    )


def test_auto_measures_blocks_that_compute_again(tmp_path, monkeypatch):
    asked = [
        "parallel.bn_group_images=4",
        "micro_batch_size=auto",
        "parallel.activation_checkpointing=blocks",
    ]
    settings = config.load(tiny.config(tmp_path), asked)
    method, forwards = build_method(settings), []
    (_, block), *_ = backbones.blocks(method)
    next(
        child for child in block.modules() if isinstance(child, torch.nn.Conv2d)
    ).register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(memory, "peak", lambda function, device: function() or 0)
    assert (
        choose_micro_batch_size(method, settings, Execution.resolve(settings.parallel, CPU)) == 24
    )
    assert len(forwards) == 2 * 3  # of three measurements
    assert "forward" not in vars(block)


def test_a_peak_is_what_was_held_at_once():
    def two_after_another():
        for _ in range(2):
            torch.ones(2**26)  # 256 MiB

    assert 250 * 2**20 < memory.peak(two_after_another, CPU) < 300 * 2**20


def test_the_seed_of_drop_path_matters(tmp_path):
    """The test above would pass for drops that are never made."""
    path = tiny.config(tmp_path)
    with_drops, without = (_steps(path, [f"backbone.drop_path={rate}"])[0] for rate in (0.3, 0.0))
    assert not torch.allclose(
        with_drops["backbone.model.layer4.0.conv1.weight"],
        without["backbone.model.layer4.0.conv1.weight"],
    )


class Regression(Method):
    """A method whose loss is a mean over images, so that micro-batches accumulate in one pass."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3).double()
        self.layer = nn.Linear(3, 2).double()
        self.num_forwards, self.num_moves = 0, 0

    def forward(self, batch):
        self.num_forwards += 1
        return {"z": self.layer(self.norm(batch.views[0].mean((2, 3))))}

    def targets(self, batch):
        return {"mean": batch.views[0].mean((1, 2, 3))}

    def loss(self, embeddings, targets):
        error = (embeddings["z"] - targets["mean"][:, None]).square().mean()
        return LossOutput(error, {"error": error})

    def frozen(self, progress):
        return ("layer.bias",) if progress.fraction < 0.5 else ()

    def after_step(self, progress, embeddings, targets):
        assert len(embeddings["z"]) == len(targets["mean"]) == 12
        self.num_moves += 1


def _regression(num_micro_batches, progress=END):
    method = Regression()
    recipe = OptimConfig(
        name="sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0, weight_decay=0.0
    )
    optimizer = optim.build(recipe, method)
    optim.set_rates(optimizer, recipe, Progress(0, 1, 1), 1, 12)
    images = 12 // num_micro_batches
    settings = ParallelConfig(precision="float64", bn_group_images=3)  # one of four micro-batches
    model = batch_norm.convert(method, images, 3)
    stepper = Stepper(
        model, optimizer, settings, 0, images, 12, OptimConfig(), Execution.resolve(settings, CPU)
    )
    views = [torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1))]
    logs = stepper(progress, Batch(views, torch.zeros(12), torch.arange(12))).logs
    return method, logs


def test_parts_of_a_mean_accumulate_in_one_pass():
    (whole, whole_logs), (parts, parts_logs) = _regression(1), _regression(4)
    assert parts.num_forwards == 4 and parts.num_moves == whole.num_moves == 1
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(
            parts.state_dict()[name],
            value,
            rtol=1e-12,
            atol=1e-12,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    torch.testing.assert_close(parts_logs["loss"], whole_logs["loss"], rtol=1e-12, atol=1e-12)


def test_frozen_parameters_do_not_move():
    untouched = Regression().layer
    frozen, _ = _regression(1, Progress(2, 20, 2))
    assert torch.equal(frozen.layer.bias, untouched.bias) and not torch.equal(
        frozen.layer.weight, untouched.weight
    )
    free, _ = _regression(1, Progress(18, 20, 2))
    assert not torch.equal(free.layer.bias, untouched.bias)


def test_unwrapping_gives_the_method():
    method = Regression()
    assert parallel.unwrap(method) is method
