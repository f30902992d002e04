"""Parts of a batch leave the gradient, the statistics and the weights of the whole batch on as many ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tiny
import torch
from conftest import run_ranks
from torch import nn

from ssl_pretrain import config, distributed, optim, parallel
from ssl_pretrain.data import loader
from ssl_pretrain.optim import OptimConfig
from ssl_pretrain.parallel import ParallelConfig
from ssl_pretrain.step import Stepper
from ssl_pretrain.train import build_method, wrap

CPU = torch.device("cpu")


def _two_steps(path, overrides):
    """Two steps over 24 images; (gradients of the second, weights and statistics, logs of the last)."""
    settings = config.load(path, overrides)
    config.check(settings, distributed.world_size())
    batches = loader.build(settings.data, settings.views, seed=0, global_batch_size=24, device=CPU)
    method = build_method(settings)
    optimizer = optim.build(settings.optim, method)
    parts = config.num_parts(settings, distributed.world_size())
    stepper = Stepper(wrap(method, settings, CPU), optimizer, settings.parallel, 0, parts, 24, 0.0, CPU)
    for step, batch in zip(range(2), batches.starting_at(0)):
        optim.set_rates(optimizer, settings.optim, 0.1, settings.epochs, 24)
        _, logs = stepper(step, 0.1, batch)
    batches.close()
    gradients = {name: parameter.grad for name, parameter in method.named_parameters()}
    return gradients, method.state_dict(), {name: value.item() for name, value in logs.items()}


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_parts_on_one_rank_equal_as_many_ranks(tmp_path, drop_path):
    path = tiny.config(tmp_path)
    overrides = ["parallel.bn_group_images=8", f"backbone.drop_path={drop_path}"]
    ranks = run_ranks(_two_steps, path, overrides, world_size=3)
    gradients, state, logs = _two_steps(path, [*overrides, "local_batch_size=8"])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, ranks[0][0][name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in state.items():
        torch.testing.assert_close(value, ranks[2][1][name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert logs["replay_error"] == 0.0  # the second pass drew the same drop-path and used the same batch norm groups


def test_the_seed_of_drop_path_matters(tmp_path):
    """The test above would pass for drops that are never made."""
    path = tiny.config(tmp_path)
    with_drops, without = (_two_steps(path, [f"backbone.drop_path={rate}"])[0] for rate in (0.3, 0.0))
    assert not torch.allclose(with_drops["backbone.model.layer4.0.conv1.weight"], without["backbone.model.layer4.0.conv1.weight"])


@dataclass(frozen=True)
class Rows:
    views: list[torch.Tensor]

    def __len__(self):
        return len(self.views[0])

    def part(self, k, num_parts):
        size = len(self) // num_parts
        return Rows([view[k * size : (k + 1) * size] for view in self.views])


class Regression(nn.Module):
    """Its loss is a mean over images, so parts accumulate in one pass."""

    couples_batch = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()
        self.embedded, self.moved = 0, 0

    def forward(self, batch):
        self.embedded += 1
        return {"z": self.layer(batch.views[0].mean((2, 3)))}

    def targets(self, batch):
        return {"mean": batch.views[0].mean((1, 2, 3))}

    def loss(self, embeddings, targets):
        error = (embeddings["z"] - targets["mean"][:, None]).square().mean()
        return error, {"error": error.detach()}

    def frozen(self, progress):
        return ("layer.bias",) if progress < 0.5 else ()

    def after_step(self, progress, embeddings, targets):
        assert len(embeddings["z"]) == len(targets["mean"]) == 12
        self.moved += 1


def _regression(num_parts, progress=1.0):
    method = Regression()
    optimizer = optim.build(OptimConfig(name="sgd", weight_decay=0.0), method)
    optim.set_rates(optimizer, OptimConfig(name="sgd", base_lr=0.1, lr_scaling="none", warmup_epochs=0), 0.0, 1, 12)
    stepper = Stepper(method, optimizer, ParallelConfig(precision="float64"), 0, num_parts, 12, 0.0, CPU)
    views = [torch.randn(12, 3, 2, 2, generator=torch.Generator().manual_seed(1))]
    _, logs = stepper(0, progress, Rows(views))
    return method, logs


def test_parts_of_a_mean_accumulate_in_one_pass():
    (whole, whole_logs), (parts, parts_logs) = _regression(1), _regression(4)
    assert parts.embedded == 4 and parts.moved == whole.moved == 1
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts_logs["loss"], whole_logs["loss"], rtol=1e-12, atol=1e-12)


def test_frozen_parameters_do_not_move():
    untouched = Regression().layer
    frozen, _ = _regression(1, progress=0.1)
    assert torch.equal(frozen.layer.bias, untouched.bias) and not torch.equal(frozen.layer.weight, untouched.weight)
    free, _ = _regression(1, progress=0.9)
    assert not torch.equal(free.layer.bias, untouched.bias)


def test_unwrapping_gives_the_method():
    method = Regression()
    assert parallel.unwrap(method) is method
