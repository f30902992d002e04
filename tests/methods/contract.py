"""What every method's tests share: a network of 700 weights with batch norm, seeded images, steps through the real Stepper.

A method's test file says what is its own: METHOD (its Config's arguments, small), OPTIM (its authors' kind of optimizer)
and, where it differs, VIEWS (sizes). `test_contract.py` runs every method that `methods.names()` finds.

    PYTHONPATH=. python tests/methods/contract.py byol      writes tests/golden/byol.txt anew

Golden losses hold for one version of torch, which their first line names: another version may choose another convolution.
"""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssl_pretrain import methods
from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from ssl_pretrain.checkpoint.run_facts import RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models.backbones import Backbone
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

ROWS = 24  # images of a global batch
NUM_STEPS, STEPS_PER_EPOCH = 20, 2
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


class Network(nn.Module):
    """Two convolutions with batch norm, 6 features."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


def test_file(name: str) -> Any:
    return importlib.import_module(f"test_{name}")


def build(name: str, **overrides: Any) -> Any:
    """The method on the small network, float64, always with the same weights."""
    torch.manual_seed(0)
    method = (
        methods.find(name)
        .Config(**{**test_file(name).METHOD, **overrides})
        .build(Backbone(Network()))
    )
    return method.double()


def batch(name: str, step: int = 0, rows: int = ROWS) -> Batch:
    """Step `step`'s global batch: noise around a colour of the class; different images each step, three classes."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(rows) % 3
    images = torch.randn(rows, 3, 1, 1, dtype=torch.float64, generator=generator) + labels.view(
        -1, 1, 1, 1
    )
    sizes = getattr(test_file(name), "VIEWS", (8, 8))
    views = [
        images + torch.randn(rows, 3, size, size, dtype=torch.float64, generator=generator)
        for size in sizes
    ]
    return Batch(views, labels, torch.arange(rows) + step * rows)


def run(
    name: str,
    steps: int = 2,
    parts: int = 1,
    group: int | str = "global",
    folder: Path | None = None,
    precision: Any = "auto",
    **overrides: Any,
) -> dict:
    """`steps` steps on this rank's rows, going on from the checkpoint in `folder` and leaving one there.

    Everything but the batch norm groups and the precision is computed as shipped.

    Returns losses (means over ranks), the last step's gradients, and the method's state.
    """
    settings = ParallelConfig(precision=precision, bn_group_images=group)
    method, recipe = build(name, **overrides), test_file(name).OPTIM
    world = process_group.world_size()
    local = ROWS // world
    example = batch(name).slice(0, world * parts)
    execution = Execution.resolve(settings, CPU)
    example = replace(example, views=execution.place_views(example.views))
    stepper = build_stepper(
        method,
        settings,
        recipe,
        execution,
        micro_batch_size=local // parts,
        global_batch_size=ROWS,
        example=example,
    )
    optimizer = stepper.optimizer
    first, checkpoints = 0, None
    if folder:
        state, facts = TrainingState(method, optimizer), RunFacts(NUM_STEPS, local // parts, "")
        checkpoints = Checkpoints(folder, state, CheckpointConfig(), facts, {}, STEPS_PER_EPOCH)
        first = checkpoints.resume(lambda manifest: None)
    gradients: dict[str, torch.Tensor] = {}

    def before_the_update(*_: Any) -> None:  # LARS writes over the gradients
        gradients.update(
            {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
        )

    optimizer.register_step_pre_hook(before_the_update)
    losses = []
    for step in range(first, first + steps):
        progress = Progress(step, NUM_STEPS, STEPS_PER_EPOCH)
        optim.set_rates(optimizer, recipe, progress, NUM_STEPS / STEPS_PER_EPOCH, ROWS)
        share = batch(name, step).slice(process_group.rank(), world)
        logs = stepper(progress, share).logs
        losses.append(collectives.reduce_sum(logs["loss"].double()).item() / world)
    if checkpoints:
        checkpoints.save(first + steps)
    return {
        "losses": losses,
        "gradients": gradients,
        "state": {key: value.clone() for key, value in method.state_dict().items()},
    }


def one_step(
    method: Any, recipe: OptimConfig, images: Batch, step: int = 0, precision: Any = "float64"
) -> None:
    """The method after one whole step of its run, as one process takes it."""
    optimizer = optim.build(recipe, method)
    progress = Progress(step, NUM_STEPS, STEPS_PER_EPOCH)
    optim.set_rates(optimizer, recipe, progress, NUM_STEPS / STEPS_PER_EPOCH, ROWS)
    settings = ParallelConfig(precision=precision)
    Stepper(
        method,
        optimizer,
        settings,
        0,
        len(images),
        len(images),
        recipe,
        Execution.resolve(settings, CPU),
    )(progress, images)


def plain_step(
    method: nn.Module,
    recipe: OptimConfig,
    loss: torch.Tensor,
    lr: float,
    weight_decay: float | None = None,
) -> None:
    """The first update of a run by the authors' optimizer, parameter by parameter, from the loss of plain loops."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    with torch.no_grad():
        for (_, p), g in zip(named, gradients):
            if g is None:
                continue
            excluded = recipe.exclude_by == "ndim" and p.ndim <= 1
            rate = lr * recipe.excluded_lr_ratio if excluded else lr
            if recipe.clip_by == "tensor" and g.norm() + 1e-6 > recipe.clip_norm:
                g = g * recipe.clip_norm / (g.norm() + 1e-6)
            if recipe.name in ("adam", "adamw"):
                own_decay = 0.0 if excluded else decay
                g = g + own_decay * p if recipe.name == "adam" else g
                p.mul_(1 - rate * own_decay if recipe.name == "adamw" else 1.0)
                p.sub_(
                    rate * g / (g.abs() + 1e-8)
                )  # the first step's moments, bias corrected, are g and g squared
                continue
            update = g if excluded else g + decay * p
            if recipe.name == "lars" and not excluded and p.norm() > 0 and update.norm() > 0:
                update = update * recipe.trust_coefficient * p.norm() / update.norm()
            if recipe.name == "larc" and not excluded:
                trust = recipe.trust_coefficient * p.norm() / (g.norm() + decay * p.norm() + 1e-8)
                update = (
                    update * (min(trust / rate, 1) if recipe.larc_clip else trust)
                    if p.norm() > 0 and g.norm() > 0
                    else g
                )
            p.sub_(rate * update)


def assert_same(got: Any, expected: Any, skip: str = "") -> None:
    """Every parameter and buffer of two modules or their states, name by name; `skip` leaves out names that hold it."""
    got, expected = (
        value.state_dict() if isinstance(value, nn.Module) else value for value in (got, expected)
    )
    assert got.keys() == expected.keys()
    for name, value in got.items():
        if not skip or skip not in name:
            torch.testing.assert_close(
                value,
                expected[name],
                rtol=1e-9,
                atol=1e-11,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def largest_error(got: Any, expected: Any, skip: str = "") -> float:
    """The largest difference of a tensor over that tensor's largest entry."""
    got, expected = (
        value.state_dict() if isinstance(value, nn.Module) else value for value in (got, expected)
    )
    names = [
        name
        for name, value in got.items()
        if value.is_floating_point() and not (skip and skip in name)
    ]
    return max(
        (
            (got[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-3)
        ).item()
        for name in names
    )


def unit(rows: torch.Tensor) -> list[torch.Tensor]:
    """Each row over its length."""
    return [row / row.square().sum().clamp(min=1e-24).sqrt() for row in rows]


def twin(method: Any) -> Any:
    return copy.deepcopy(method)


def with_views(images: Batch, views: list[torch.Tensor]) -> Batch:
    return replace(images, views=views)


def torch_release() -> str:
    """The version of torch without its build, such as 2.13."""
    return ".".join(torch.__version__.split(".")[:2])


def golden(name: str) -> list[float]:
    """The golden losses, or a skip under another version of torch than the one that they were written with."""
    header, *lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    written_with = header.rpartition("torch ")[2]
    if written_with != torch_release():
        pytest.skip(
            f"the golden losses are those of torch {written_with}, and this is torch {torch_release()}"
        )
    return [float(line.split()[1]) for line in lines]


def write_golden(name: str, losses: list[float]) -> None:
    header = (
        f"# step loss: tests/methods/contract.py, float64, one process, torch {torch_release()}"
    )
    lines = [f"{step} {loss:.12g}" for step, loss in enumerate(losses, start=1)]
    (GOLDEN / f"{name}.txt").write_text("\n".join([header, *lines]) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        write_golden(name, run(name, 10, precision="float64")["losses"])
