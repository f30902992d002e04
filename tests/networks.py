"""Twenty steps of a method on a real timm network, for the tests of parallel/ and checkpoint/.

Keys of `parallel` have their defaults unless a test sets them.
"""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_texts
import torch

from ssl_pretrain import methods
from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig, Checkpoints, RunFacts
from ssl_pretrain.checkpoint.state import TrainingState
from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.parallel import wrap as parallel
from ssl_pretrain.parallel.execution import Execution, ParallelConfig
from ssl_pretrain.step import Stepper, build_stepper
from ssl_pretrain.views.batch import Batch

ROWS, SIZE, NUM_STEPS, STEPS_PER_EPOCH = 8, 16, 20, 2
CPU = torch.device("cpu")
RESNET = BackboneConfig(name="test_resnet")
VIT = BackboneConfig(name="test_vit", args={"depth": 2, "patch_size": 8})
ADAMW = {
    "name": "adamw",
    "base_lr": 0.001,
    "lr_scaling": "none",
    "warmup_epochs": 1,
    "weight_decay": 0.1,
}
# SimCLR's learning rate is small because LARS on eight images of noise amplifies rounding. In
# twenty steps a difference of 1e-15 grows to 5e-9 at rates of 0.1 and 0.3, and to 1e-10 at 0.03.
CASES: dict[str, Any] = {  # backbone, settings of the method and the optimizer, view sizes
    "simclr": (
        RESNET,
        {"projector_dims": [16, 9]},
        {"name": "lars", "base_lr": 0.02, "lr_scaling": "none", "warmup_epochs": 1},
        (16, 16),
    ),
    "moco_v3": (
        VIT,
        {"hidden_dim": 16, "dim": 9, "temperature": 0.2, "vit_starts": "authors"},
        ADAMW,
        (16, 16),
    ),
    "dino": (
        VIT,
        {"hidden_dim": 16, "bottleneck_dim": 9, "num_prototypes": 21, "train_norm": True},
        {**ADAMW, "clip_norm": 0.3, "clip_by": "tensor"},
        (16, 16, 8),
    ),
    "clip": (RESNET, {"dim": 9}, ADAMW, (16,)),
    "siglip": (VIT, {"dim": 9}, ADAMW, (16,)),
    "simcse": (RESNET, {"texts": "triplets", "encoders": "separate"}, ADAMW, ()),  # no views
    "several_networks": (
        BackboneConfig(name="test_vit", args={"depth": 2, "patch_size": 4}),
        {},
        ADAMW,
        (16,),
    ),
}


def random_batch(step: int, sizes: tuple[int, ...], rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = [
        torch.randn(rows, 3, size, size, dtype=torch.float64, generator=generator) for size in sizes
    ]
    # Methods of images alone ignore the texts.
    texts = small_texts.random_texts(rows, step, num_texts=1 if sizes else 3)
    return Batch(views, torch.arange(rows) % 3, torch.arange(rows) + step * rows, (), texts)


def build_case(
    name: str,
    num_micro_batches: int = 1,
    rows: int = ROWS,
    backbone: dict[str, Any] | None = None,
    optimizer: Any = None,
    **settings: Any,
):
    """Return a stepper with seeded weights, and the sizes of its views."""
    network, method_settings, optim_settings, sizes = CASES[name]
    torch.manual_seed(0)
    network = backbones.build(BackboneConfig(**{**vars(network), **(backbone or {})}), SIZE)
    module = methods.find(name) if name in methods.names() else importlib.import_module(name)
    method: Any = small_texts.build_method(module.Config(**method_settings), network, dropout=0.0)
    config = ParallelConfig(**settings)
    world_size = process_group.world_size()
    micro_batch_size = rows // world_size // num_micro_batches
    example = random_batch(0, sizes, rows).slice(0, world_size * num_micro_batches)
    execution = Execution.resolve(config, CPU)
    example = replace(example, views=execution.place_views(example.views))
    optim_config = OptimConfig(**(optimizer or optim_settings))
    stepper = build_stepper(
        method,
        config,
        optim_config,
        execution,
        micro_batch_size=micro_batch_size,
        global_batch_size=rows,
        example=example,
    )
    return stepper, sizes


def run(name: str, steps: int, folder: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Take steps and return the losses and the full state.

    With a folder, resume from its checkpoint if there is one, and save another at the end.
    """
    stepper, sizes = build_case(name, **settings)
    method: Any = parallel.unwrap(stepper.model)
    first_step, checkpoints = 0, None
    if folder:
        state = TrainingState(method, stepper.optimizer)
        facts = RunFacts(NUM_STEPS, stepper.micro_batch_size, "")
        checkpoints = Checkpoints(folder, state, CheckpointConfig(), facts, {}, STEPS_PER_EPOCH)
        first_step = checkpoints.resume(check_config=lambda saved_config, path: None)
    losses = []
    for step in range(first_step, first_step + steps):
        losses.append(take_step(stepper, sizes, step))
    if checkpoints:
        checkpoints.save(first_step + steps)
    return {"losses": losses, "state": full_state(method)}


def take_step(stepper: Stepper, sizes: tuple[int, ...], step: int) -> float:
    """Take one step and return the mean loss over ranks."""
    progress = Progress(step, NUM_STEPS, STEPS_PER_EPOCH)
    optim.set_rates(
        stepper.optimizer,
        stepper.optim_config,
        progress,
        NUM_STEPS / STEPS_PER_EPOCH,
        stepper.global_batch_size,
    )
    local_batch = random_batch(step, sizes, stepper.global_batch_size).slice(
        process_group.rank(), process_group.world_size()
    )
    logs = stepper(progress, local_batch).logs
    return collectives.reduce_sum(logs["loss"].double()).item() / process_group.world_size()


def full_state(method: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every tensor of the state. Sharded ones are gathered."""
    return {
        name: (value.full_tensor() if collectives.is_sharded(value) else value).detach().clone()
        for name, value in method.state_dict().items()
    }


def largest_difference(
    tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> float:
    """Return the largest error of a tensor relative to its largest element."""
    assert tensors.keys() == expected.keys()
    return max(
        ((tensors[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        for name, value in expected.items()
        if value.is_floating_point()
    )
