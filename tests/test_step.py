"""Micro-batches on one rank give the same gradients, statistics and weights as that many ranks."""

import subprocess
import sys

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
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper
from ssl_pretrain.system.import_path import child_environment

pytestmark = pytest.mark.promise

CPU = torch.device("cpu")
END = Progress(20, 20, 2)


def _take_steps(path, overrides, num_steps=2):
    """Take `num_steps` steps, and return the last gradients, the final state and the last logs."""
    settings = config.load(path, overrides)
    config.check(settings, process_group.world_size())
    num_images = settings.global_batch_size
    batches = loader.build(
        settings.data, settings.views, seed=0, global_batch_size=num_images, device=CPU
    )
    method = build_method(settings)
    stepper = build_run_stepper(method, settings, Execution.resolve(settings.parallel, CPU))
    for step, batch in zip(range(num_steps), batches.iterate_from(0)):
        progress = Progress(step + 2, 20, 2)
        optim.set_rates(stepper.optimizer, settings.optim, progress, settings.epochs, num_images)
        logs = stepper(progress, batch).logs
    batches.close()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return gradients, method.state_dict(), {name: value.item() for name, value in logs.items()}


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_micro_batches_on_one_rank_equal_as_many_ranks(tmp_path, drop_path):
    path = tiny.write_config(tmp_path)
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    _assert_micro_batches_equal_ranks(path, [*overrides, "parallel.precision=float64"], 3, 8)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_micro_batches_on_one_rank_equal_as_many_ranks_in_float32(tmp_path, drop_path):
    path = tiny.write_config(tmp_path)
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    overrides += ["parallel.precision=float32"]
    _assert_micro_batches_equal_ranks(path, overrides, 3, 8, num_steps=1, tolerance=1e-4)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_micro_batches_on_one_rank_equal_as_many_ranks_in_bfloat16(tmp_path, drop_path):
    """The two differ by much less than either differs from float64."""
    path = tiny.write_config(tmp_path)
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    in_bfloat16 = [*overrides, "parallel.precision=bfloat16"]
    ranks = run_ranks(_take_steps, path, in_bfloat16, 1, world_size=3)[0][0]
    rounded = _take_steps(path, [*in_bfloat16, "micro_batch_size=8"], 1)[0]
    overrides += ["parallel.precision=float64", "micro_batch_size=8"]
    exact = _take_steps(path, overrides, 1)[0]
    for name, gradient in exact.items():
        rounding = torch.linalg.vector_norm(rounded[name] - gradient)
        difference = torch.linalg.vector_norm(rounded[name] - ranks[name])
        assert difference <= 0.2 * rounding, name


@pytest.mark.full
def test_a_batch_of_256_in_eight_micro_batches_equals_eight_ranks(tmp_path):
    overrides = [
        "data.source=digits",
        "data.root=''",
        "global_batch_size=256",
        "parallel.bn_group_images=32",
        "parallel.precision=float64",
    ]
    _assert_micro_batches_equal_ranks(tiny.write_config(tmp_path), overrides, 8, 32)


def _assert_micro_batches_equal_ranks(
    path, overrides, world_size, micro_batch_size, num_steps=2, tolerance=1e-9
):
    ranks = run_ranks(_take_steps, path, overrides, num_steps, world_size=world_size)
    overrides = [*overrides, f"micro_batch_size={micro_batch_size}"]
    gradients, state, logs = _take_steps(path, overrides, num_steps)
    _assert_close_by_name(gradients, ranks[0][0], tolerance)
    _assert_close_by_name(state, ranks[-1][1], tolerance)
    # The second pass repeats the drop path and the batch norm groups of the first.
    assert logs["replay_error"] == 0.0


def _assert_close_by_name(actual, expected, tolerance):
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=f"{name}: {{}}".format
        )


def _take_steps_with_a_nan_on_rank_1(path):
    """Take one step, and a second one with a NaN pixel on rank 1.

    Returns the names of the tensors that the second step changed, `step_taken` of both steps, the
    number of skipped steps, and the description of the bad embeddings.
    """
    settings = config.load(path, ["parallel.bn_group_images=12"])
    batches = loader.build(settings.data, settings.views, seed=0, global_batch_size=24, device=CPU)
    method = build_method(settings)
    stepper = build_run_stepper(method, settings, Execution.resolve(settings.parallel, CPU))
    steps_taken = []
    method.after_step = lambda progress, embeddings, targets: steps_taken.append(
        float(method.step_taken)
    )
    for step, batch in zip(range(2), batches.iterate_from(0)):
        progress = Progress(step, 4, 2)
        optim.set_rates(stepper.optimizer, settings.optim, progress, settings.epochs, 24)
        state_before = {name: value.clone() for name, value in method.state_dict().items()}
        if step == 1 and process_group.rank() == 1:
            batch.views[1][0, 0, 0, 0] = float("nan")
        logs = stepper(progress, batch).logs
    batches.close()
    state = {name: v for name, v in method.state_dict().items() if "num_batches" not in name}
    changed_names = [
        name for name, value in state.items() if not torch.equal(value, state_before[name])
    ]
    return (
        changed_names,
        steps_taken,
        logs["skipped_steps"].item(),
        stepper.describe_nonfinite_embeddings(),
    )


@pytest.mark.case(19)
def test_a_batch_with_nan_changes_nothing_on_any_rank_and_is_named(tmp_path):
    path = tiny.write_config(tmp_path)
    for changed_names, steps_taken, num_skipped, description in run_ranks(
        _take_steps_with_a_nan_on_rank_1, path, world_size=2
    ):
        assert changed_names == []
        assert steps_taken == [1.0, 0.0]
        assert num_skipped == 1.0
        assert description == "z_a of rank 1 since step 2, z_b of rank 1 since step 2"


def test_one_pass_with_a_coupled_loss_is_refused(tmp_path):
    path, one_pass = tiny.write_config(tmp_path), "parallel.accumulation=one_pass"
    with pytest.raises(ValueError) as error:
        _take_steps(path, ["parallel.bn_group_images=8", "micro_batch_size=8", one_pass])
    assert str(error.value) == (
        "parallel.accumulation: one_pass does not train simclr: this loss compares images across "
        "the whole batch. Summing the losses of micro-batches would drop the pairs between them. "
        "Set auto or two_passes, which keep all pairs"
    )
    _take_steps(path, [one_pass])  # accepted: the whole batch is one micro-batch


AUTO = ["parallel.bn_group_images=4", "micro_batch_size=auto"]


def test_auto_measures_and_takes_the_whole_batch(tmp_path, capsys):
    settings = config.load(tiny.write_config(tmp_path), AUTO)
    execution = Execution.resolve(settings.parallel, CPU)
    assert choose_micro_batch_size(build_method(settings), settings, execution) == 24
    assert "micro_batch_size: auto chose 24 of 24 images per rank (" in capsys.readouterr().out


def test_auto_takes_the_largest_micro_batch_that_fits(monkeypatch):
    monkeypatch.setattr(memory, "measure_peak_bytes", lambda function, device: function() or 0)

    def measure(num_images):
        return {8: 100, 24: 260}[num_images] * memory.GIB

    size, description = memory.largest_micro_batch(24, 4, measure, 200 * memory.GIB)
    assert size == 12
    assert description == "20.00 GiB + 10240.00 MiB per image, 200.0 GiB free"
    with pytest.raises(ValueError) as error:
        memory.largest_micro_batch(24, 4, measure, 60 * memory.GIB)
    assert str(error.value) == (
        "micro_batch_size=auto: not even a micro-batch of 4 images fits "
        "(20.00 GiB + 10240.00 MiB per image, 60.0 GiB free); use a smaller crop size or "
        "backbone, a smaller parallel.bn_group_images, or more ranks"
    )


def test_auto_measures_with_activation_checkpointing(tmp_path, monkeypatch):
    overrides = [*AUTO, "parallel.activation_checkpointing=blocks"]
    settings = config.load(tiny.write_config(tmp_path), overrides)
    method, forward_calls = build_method(settings), []
    (_, block), *_ = backbones.blocks(method)
    layer = next(child for child in block.modules() if isinstance(child, torch.nn.Conv2d))
    layer.register_forward_hook(lambda *_: forward_calls.append(1))
    monkeypatch.setattr(memory, "measure_peak_bytes", lambda function, device: function() or 0)
    execution = Execution.resolve(settings.parallel, CPU)
    assert choose_micro_batch_size(method, settings, execution) == 24
    assert len(forward_calls) == 2 * 3  # two forward passes in each of three measurements
    assert "forward" not in vars(block)


def test_a_peak_counts_the_memory_held_at_once():
    # A new process, because freed blocks of other tests may hold the first 256 MiB but not both.
    code = """
import torch
from ssl_pretrain.parallel import memory

def allocate_one_after_another():
    for _ in range(2):
        torch.ones(2**26)  # 256 MiB

print(memory.measure_peak_bytes(allocate_one_after_another, torch.device("cpu")))
"""
    command = [sys.executable, "-c", code]
    peak = int(subprocess.check_output(command, env=child_environment(), text=True))
    assert 250 * 2**20 < peak < 300 * 2**20


def test_drop_path_changes_the_gradient(tmp_path):
    """Without an effect, comparing micro-batches with ranks proves nothing about drop path."""
    path, name = tiny.write_config(tmp_path), "backbone.model.layer4.0.conv1.weight"
    gradients_with_drops, gradients_without = (
        _take_steps(path, [f"backbone.drop_path={rate}"])[0] for rate in (0.3, 0.0)
    )
    assert not torch.allclose(gradients_with_drops[name], gradients_without[name])


class Regression(Method):
    """A method whose loss is a mean over images, so that micro-batches accumulate in one pass."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(3).double()
        self.layer = nn.Linear(3, 2).double()
        self.num_forwards, self.num_updates = 0, 0

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
        self.num_updates += 1


def _regression(num_micro_batches, progress=END):
    method = Regression()
    optim_config = OptimConfig(
        name="sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0, weight_decay=0.0
    )
    optimizer = optim.build(optim_config, method)
    optim.set_rates(optimizer, optim_config, Progress(0, 1, 1), 1, 12)
    micro_batch_size = 12 // num_micro_batches
    # A group of 3 images is one of four micro-batches.
    parallel_config = ParallelConfig(precision="float64", bn_group_images=3)
    model = batch_norm.convert(method, micro_batch_size, 3)
    execution = Execution.resolve(parallel_config, CPU)
    stepper = Stepper(
        model, optimizer, parallel_config, 0, micro_batch_size, 12, OptimConfig(), execution
    )
    views = [torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1))]
    logs = stepper(progress, Batch(views, torch.zeros(12), torch.arange(12))).logs
    return method, logs


def test_micro_batches_of_a_mean_accumulate_in_one_pass():
    (expected, expected_logs), (method, logs) = _regression(1), _regression(4)
    assert method.num_forwards == 4
    assert method.num_updates == expected.num_updates == 1
    _assert_close_by_name(expected.state_dict(), method.state_dict(), tolerance=1e-12)
    torch.testing.assert_close(logs["loss"], expected_logs["loss"], rtol=1e-12, atol=1e-12)


def test_frozen_parameters_do_not_move():
    initial_layer = Regression().layer
    method, _ = _regression(1, Progress(2, 20, 2))
    assert torch.equal(method.layer.bias, initial_layer.bias)
    assert not torch.equal(method.layer.weight, initial_layer.weight)
    method, _ = _regression(1, Progress(18, 20, 2))
    assert not torch.equal(method.layer.bias, initial_layer.bias)


def test_unwrapping_gives_the_method():
    method = Regression()
    assert parallel.unwrap(method) is method
