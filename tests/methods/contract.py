"""Train methods on seeded images with a network of 700 weights and batch norm, for their tests.

A method's test file defines METHOD (arguments of its Config for small networks) and OPTIM (the kind
of optimizer that its authors use). If they differ from the usual, it also defines

    VIEWS       sizes of the views
    BACKBONE    function without arguments that returns a small Backbone, such as a ViT
    MASKS       function of the number of images and the step that returns a tuple of MaskSets
    TEXTS       function of the number of images and the step that returns a tuple of TextSets
    HAS_PAIR    False if the method has no two embeddings of an image to compare
    HAS_DROPOUT True if the network drops values at random, by the slice of the global batch

`test_contract.py` runs every method that `methods.names()` lists.

    PYTHONPATH=. python tests/methods/contract.py byol      rewrites tests/golden/byol.txt

Golden losses are valid for one version of torch, because another version may choose a different
convolution algorithm. Their first line names the version.
"""

import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_texts
import torch
from torch import nn

from ssl_pretrain import methods
from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints, RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

ROWS = 24  # images per global batch
NUM_STEPS, STEPS_PER_EPOCH = 20, 2
CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"


class Network(nn.Module):
    """Two convolutions with batch norm, and 6 features."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


def import_test_file(name: str) -> Any:
    return importlib.import_module(f"test_{name}")


def build(name: str, **overrides: Any) -> Any:
    """Build the method on the small network in float64, always with the same weights."""
    torch.manual_seed(0)
    test_file = import_test_file(name)
    config = methods.find(name).Config(**{**test_file.METHOD, **overrides})
    backbone = test_file.BACKBONE() if hasattr(test_file, "BACKBONE") else Backbone(Network())
    return small_texts.build_method(config, backbone).double()


def random_batch(name: str, step: int = 0, rows: int = ROWS) -> Batch:
    """Return the global batch of a step, whose images are noise around the color of their class.

    There are three classes, and every step has different images.
    """
    generator = torch.Generator().manual_seed(step)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(rows, 3, size, size, dtype=torch.float64, generator=generator)

    labels = torch.arange(rows) % 3
    colors = noise(1) + labels.view(-1, 1, 1, 1)
    test_file = import_test_file(name)
    views = [colors + noise(size) for size in getattr(test_file, "VIEWS", (8, 8))]
    masks = test_file.MASKS(rows, step) if hasattr(test_file, "MASKS") else ()
    texts = test_file.TEXTS(rows, step) if hasattr(test_file, "TEXTS") else ()
    return Batch(views, labels, torch.arange(rows) + step * rows, masks, texts)


def train(
    name: str,
    steps: int = 2,
    num_micro_batches: int = 1,
    group: int | str = "global",
    folder: Path | None = None,
    precision: Any = "auto",
    **overrides: Any,
) -> dict:
    """Take `steps` steps on this rank's rows.

    With a `folder`, resume from its checkpoint and save one at the end. All settings except the
    batch norm groups and the precision have their default values.

    Returns:
        Losses (means over ranks), the last step's gradients, and the method's state.
    """
    settings = ParallelConfig(precision=precision, bn_group_images=group)
    method, recipe = build(name, **overrides), import_test_file(name).OPTIM
    world_size = process_group.world_size()
    micro_batch_size = ROWS // world_size // num_micro_batches
    example = random_batch(name).slice(0, world_size * num_micro_batches)
    execution = Execution.resolve(settings, CPU)
    example = replace(example, views=execution.place_views(example.views))
    stepper = build_stepper(
        method,
        settings,
        recipe,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=ROWS,
        example=example,
    )
    optimizer = stepper.optimizer
    first_step, checkpoints = 0, None
    if folder:
        state, facts = TrainingState(method, optimizer), RunFacts(NUM_STEPS, micro_batch_size, "")
        checkpoints = Checkpoints(folder, state, CheckpointConfig(), facts, {}, STEPS_PER_EPOCH)
        first_step = checkpoints.resume(check_config=lambda saved_config, path: None)
    gradients: dict[str, torch.Tensor] = {}

    def copy_gradients(*_: Any) -> None:
        for key, parameter in method.named_parameters():
            if parameter.grad is not None:
                gradients[key] = parameter.grad.clone()

    optimizer.register_step_pre_hook(copy_gradients)  # LARS overwrites the gradients
    losses = []
    for step in range(first_step, first_step + steps):
        progress = Progress(step, NUM_STEPS, STEPS_PER_EPOCH)
        optim.set_rates(optimizer, recipe, progress, NUM_STEPS / STEPS_PER_EPOCH, ROWS)
        local_batch = random_batch(name, step).slice(process_group.rank(), world_size)
        logs = stepper(progress, local_batch).logs
        losses.append(collectives.reduce_sum(logs["loss"].double()).item() / world_size)
    if checkpoints:
        checkpoints.save(first_step + steps)
    return {
        "losses": losses,
        "gradients": gradients,
        "state": {key: value.clone() for key, value in method.state_dict().items()},
    }


def take_step(
    method: Any, recipe: OptimConfig, images: Batch, step: int = 0, precision: Any = "float64"
) -> None:
    """Take one whole step of a run on one process."""
    optimizer = optim.build(recipe, method)
    progress = Progress(step, NUM_STEPS, STEPS_PER_EPOCH)
    optim.set_rates(optimizer, recipe, progress, NUM_STEPS / STEPS_PER_EPOCH, ROWS)
    settings = ParallelConfig(precision=precision)
    execution, num_images = Execution.resolve(settings, CPU), len(images)
    stepper = Stepper(method, optimizer, settings, 0, num_images, num_images, recipe, execution)
    stepper(progress, images)


def apply_plain_step(
    method: nn.Module,
    recipe: OptimConfig,
    loss: torch.Tensor,
    lr: float,
    weight_decay: float | None = None,
) -> None:
    """Apply the first update of the authors' optimizer, parameter by parameter."""
    named_parameters = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named_parameters], allow_unused=True)
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    with torch.no_grad():
        for (_, p), g in zip(named_parameters, gradients):
            if g is None:
                continue
            excluded = recipe.exclude_by == "ndim" and p.ndim <= 1
            rate = lr * recipe.excluded_lr_ratio if excluded else lr
            if recipe.clip_by == "tensor" and g.norm() + 1e-6 > recipe.clip_norm:
                g = g * recipe.clip_norm / (g.norm() + 1e-6)
            if recipe.name in ("adam", "adamw"):
                p_decay = 0.0 if excluded else decay
                g = g + p_decay * p if recipe.name == "adam" else g
                p.mul_(1 - rate * p_decay if recipe.name == "adamw" else 1.0)
                # The bias-corrected moments of the first step are g and g squared.
                p.sub_(rate * g / (g.abs() + 1e-8))
                continue
            update = g if excluded else g + decay * p
            if recipe.name == "lars" and not excluded and p.norm() > 0 and update.norm() > 0:
                update = update * recipe.trust_coefficient * p.norm() / update.norm()
            if recipe.name == "larc" and not excluded:
                trust = recipe.trust_coefficient * p.norm() / (g.norm() + decay * p.norm() + 1e-8)
                trust = min(trust / rate, 1) if recipe.larc_clip else trust
                update = update * trust if p.norm() > 0 and g.norm() > 0 else g
            p.sub_(rate * update)


def assert_equal_by_name(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    rtol: float = 1e-9,
    atol: float = 1e-10,
) -> None:
    """Compare the tensors of two dictionaries. A failure names the tensor."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=rtol, atol=atol, msg=f"{name}: {{}}".format
        )


def state_of(module_or_state: Any) -> dict[str, torch.Tensor]:
    is_module = isinstance(module_or_state, nn.Module)
    return module_or_state.state_dict() if is_module else module_or_state


def assert_same(actual: Any, expected: Any, atol: float = 1e-11) -> None:
    """Compare every parameter and buffer of two modules or their states."""
    assert_equal_by_name(state_of(actual), state_of(expected), atol=atol)


def largest_error(actual: Any, expected: Any) -> float:
    """Return the largest difference of a tensor, relative to that tensor's largest entry."""
    expected = state_of(expected)
    errors = []
    for name, value in state_of(actual).items():
        if value.is_floating_point():
            scale = expected[name].abs().max().clamp(min=1e-3)
            errors.append(((value - expected[name]).abs().max() / scale).item())
    return max(errors)


def unit_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Divide each row by its length."""
    return [row / row.square().sum().clamp(min=1e-24).sqrt() for row in rows]


def copy_method(method: Any) -> Any:
    return copy.deepcopy(method)


def replace_views(images: Batch, views: list[torch.Tensor]) -> Batch:
    return replace(images, views=views)


def torch_release() -> str:
    """Return the major and minor version of torch, such as 2.13."""
    return ".".join(torch.__version__.split(".")[:2])


def read_golden(name: str) -> list[float]:
    """Return the golden losses, or skip the test if they are from another version of torch."""
    header, *lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
    release = header.rpartition("torch ")[2]
    if release != torch_release():
        pytest.skip(f"the golden losses are for torch {release}, this is torch {torch_release()}")
    return [float(line.split()[1]) for line in lines]


def write_golden(name: str, losses: list[float]) -> None:
    header = (
        f"# step loss: tests/methods/contract.py, float64, one process, torch {torch_release()}"
    )
    lines = [f"{step} {loss:.12g}" for step, loss in enumerate(losses, start=1)]
    (GOLDEN / f"{name}.txt").write_text("\n".join([header, *lines]) + "\n")


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # test files import conftest
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        write_golden(name, train(name, 10, precision="float64")["losses"])
