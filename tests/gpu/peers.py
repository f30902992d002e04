"""Training steps of other libraries, with the same network, views and precision as ours."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ssl_pretrain.config import RunConfig
from ssl_pretrain.views import recipe

# Libraries whose loops are not timed. Their published numbers are in run.PUBLISHED.
OTHER_PEERS = ("stable_pretraining", "lightly_train")
LIGHTLY_STEPS = ("simclr", "barlow_twins", "dino", "swav")  # methods with a step below
Step = Callable[[], object]


def describe_other_peers() -> dict[str, str]:
    """Return for each other library whether it is installed."""
    return {
        name: "installed; no loop of it is timed" if find_spec(name) else "not installed"
        for name in OTHER_PEERS
    }


def build_lightly_step(run: RunConfig, images: int, device: torch.device) -> Step:
    """Build a step of lightly's losses and heads on the run's network.

    The views are random and already on the device. Color and copy are not included.

    Raises:
        ImportError: If lightly is not installed.
        LookupError: If lightly has no loop of this method.
    """
    name = run.method.name
    if name not in LIGHTLY_STEPS:
        raise LookupError(f"lightly has no loop of {name} to compare with")
    import lightly.loss as losses
    import timm
    from lightly.models.modules import heads

    backbone = timm.create_model(run.backbone.name, num_classes=0, **run.backbone.args)
    width, method = backbone.num_features, run.method
    modules = nn.ModuleDict({"backbone": backbone})
    views = [
        torch.randn(images, 3, crop.size, crop.size, device=device).to(
            memory_format=torch.channels_last
        )
        for crop in recipe.crop_per_view(run.views)
    ]
    criterion: Any

    def embed(network: Any, head: Any, inputs: list[Tensor]) -> list[Tensor]:
        return [head(network(view)) for view in inputs]

    def compute_loss() -> Tensor:
        return criterion(*embed(backbone, modules["head"], views))

    if name == "simclr":
        modules["head"] = heads.SimCLRProjectionHead(width, width, 128, num_layers=3)
        criterion = losses.NTXentLoss(temperature=0.1)
    elif name == "barlow_twins":
        dims = method.projector_dims
        modules["head"] = heads.BarlowTwinsProjectionHead(width, dims[0], dims[-1])
        criterion = losses.BarlowTwinsLoss()
    elif name == "dino":
        teacher = timm.create_model(run.backbone.name, num_classes=0, **run.backbone.args)
        num_prototypes = method.num_prototypes
        modules["head"] = heads.DINOProjectionHead(width, output_dim=num_prototypes)
        teacher_head = heads.DINOProjectionHead(width, output_dim=num_prototypes)
        nn.ModuleList([teacher, teacher_head]).to(device).requires_grad_(False)
        criterion = losses.DINOLoss(output_dim=num_prototypes).to(device)

        def compute_loss() -> Tensor:
            with torch.no_grad():
                targets = embed(teacher, teacher_head, views[:2])
            return criterion(targets, embed(backbone, modules["head"], views), epoch=50)
    else:
        modules["head"] = nn.Sequential(
            heads.SwaVProjectionHead(width, 2048, 128),
            nn.Sequential(_Normalize(), heads.SwaVPrototypes(128, n_prototypes=3000)),
        )
        criterion = losses.SwaVLoss()

        def compute_loss() -> Tensor:
            outputs = embed(backbone, modules["head"], views)
            return criterion(outputs[:2], outputs[2:])

    modules.to(device, memory_format=torch.channels_last)
    optimizer = _build_optimizer(run, modules, device)

    def take_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compute_loss()
        loss.backward()
        optimizer.step()

    return take_step


class _Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1)


def _build_optimizer(run: RunConfig, modules: nn.Module, device: torch.device) -> Any:
    parameters = list(modules.parameters())
    if run.optim.name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-3, fused=device.type == "cuda")
    from lightly.utils.lars import LARS

    return LARS(parameters, lr=0.3, momentum=0.9, weight_decay=1e-4)
