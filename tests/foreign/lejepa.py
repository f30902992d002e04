"""Compare whole optimizer steps of LeJEPA with the authors' code, in float64 on real images.

    git clone https://github.com/rbalestr-lab/lejepa && git -C lejepa checkout eddffdd857
    LEJEPA=$PWD/lejepa SSL_PRETRAIN_DATA=data PYTHONPATH=. .venv/bin/python tests/foreign/lejepa.py

It prints the largest relative difference of any weight after three steps of AdamW:

- `MINIMAL.md`: the authors' network, loss, optimizer and schedule of that page, with four views of
  128 pixels. ViT-S/8 has two blocks, no drop path, and their slices are ours.
- `package`: their statistic and their slices, which replace ours, with two global and two local
  views, on 1, 2 and 3 ranks of gloo with other images on each. Their all-reduce is theirs.

Constants that their classes round to float32 are computed in float64. Biases that a later layer
cancels are not compared.
"""

import ast
import importlib
import io
import os
import re
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[1])]

from comparison import build_float64_stepper
from conftest import run_ranks

from ssl_pretrain.distributed import process_group
from ssl_pretrain.losses import normality
from ssl_pretrain.methods.lejepa import Config
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.optim import optimizers
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.optim.schedules import Progress
from ssl_pretrain.step import Stepper
from ssl_pretrain.views.batch import Batch

OFFICIAL = Path(os.environ["LEJEPA"])
IMAGES = Path(os.environ["SSL_PRETRAIN_DATA"]) / "imagenet_sample.zip"
NUM_STEPS, STEPS_PER_EPOCH, EPOCHS = 3, 40, 800
CANCELED_BIASES = {"embedding.bias", "projector.0.bias", "projector.3.bias"}


def load_views(step: int, num_images: int, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return crops of real images, other ones in every step. Smaller crops show less of them."""
    rng, views = np.random.default_rng(step), [[] for _ in sizes]
    with zipfile.ZipFile(IMAGES) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        for name in names[step * num_images : (step + 1) * num_images]:
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((256, 256))
            pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].double() / 255
            for view, size in zip(views, sizes):
                side = int(rng.integers(size, 2 * size) if size < 128 else rng.integers(128, 257))
                top, left = rng.integers(0, 257 - side, 2)
                crop = pixels[:, :, top : top + side, left : left + side]
                view.append((interpolate(crop, size=(size, size), mode="bilinear") - 0.45) / 0.225)
    return [torch.cat(view) for view in views]


def build_our_stepper(
    config: Config, backbone: BackboneConfig, size: int, recipe: OptimConfig, num_images: int
) -> Stepper:
    torch.manual_seed(0)
    method = config.build(backbones.build(backbone, size)).double()
    local_size = num_images // process_group.world_size()
    blank = [torch.zeros(local_size, 3, size, size, dtype=torch.float64)] * 4
    indices = torch.arange(local_size)
    return build_float64_stepper(method, recipe, Batch(blank, indices, indices))


def take_our_step(stepper: Stepper, step: int, views: list[torch.Tensor], epochs: int) -> None:
    progress = Progress(step, epochs * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    optimizers.set_rates(
        stepper.optimizer, stepper.optim_config, progress, epochs, stepper.global_batch_size
    )
    indices = torch.arange(len(views[0]))
    stepper(progress, Batch(views, indices, indices))


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest difference of a tensor, relative to that tensor's largest entry."""
    ours, theirs = with_gradient(ours), with_gradient(theirs)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differences = [
        (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-3)
        for name in ours
    ]
    return max(differences).item()


def with_gradient(state: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors without the biases of the last norm and of the keys, which are canceled.

    Their gradients are rounding errors, which AdamW divides by its epsilon.
    """
    kept = {name: x for name, x in state.items() if not name.endswith("model.norm.bias")}
    for name in [name for name in kept if name.endswith("qkv.bias")]:
        query, _, value = kept[name].chunk(3)
        kept[name] = torch.cat([query, value])
    return kept


class Page:
    """The definitions and assignments in the Python blocks of MINIMAL.md, by name."""

    def __init__(self, names: dict[str, Any]):
        text = (OFFICIAL / "MINIMAL.md").read_text().replace('device="cuda"', 'device="cpu"')
        self.names = names
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        trees = [
            ast.parse(block) for block in blocks if "class SIGReg" in block or "def main" in block
        ]
        self._nodes = [node for tree in trees for node in ast.walk(tree)]

    def define(self, *wanted: str) -> None:
        """Run the classes and assignments of these names, in this order."""
        for name in wanted:
            (node,) = [
                node
                for node in self._nodes
                if (isinstance(node, ast.ClassDef) and node.name == name)
                or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name)
            ]
            exec(compile(ast.Module([node], []), "MINIMAL.md", "exec"), self.names)


def compare_minimal() -> float:
    """Compare with the page: its network, SIGReg, loss, parameter group and schedule."""
    recipe = OptimConfig(
        name="adamw",
        base_lr=0.002,
        lr_scaling="none",
        warmup_epochs=1,
        warmup_start_ratio=0.01,
        final_lr_ratio=0.5,
        weight_decay=0.05,
        exclude_by="none",
    )
    config = Config(
        projector_dims=[2048, 2048, 16], num_global_views=4, sigreg_weight=0.02, num_slices=256
    )
    backbone = BackboneConfig(name="vit_small_patch8_224", args={"depth": 2})
    num_images = 4
    stepper = build_our_stepper(config, backbone, 128, recipe, num_images)
    method = stepper.method

    def create_model(name: str, **options: Any) -> nn.Module:
        return timm.create_model(name, **options | {"depth": 2, "drop_path_rate": 0.0})

    page = Page(
        {
            "torch": torch,
            "nn": nn,
            "timm": types.SimpleNamespace(create_model=create_model),
            "MLP": torchvision.ops.MLP,
            "LinearLR": torch.optim.lr_scheduler.LinearLR,
            "CosineAnnealingLR": torch.optim.lr_scheduler.CosineAnnealingLR,
            "SequentialLR": torch.optim.lr_scheduler.SequentialLR,
            "cfg": types.SimpleNamespace(lr=0.002, lamb=0.02, epochs=EPOCHS),
            "train": range(STEPS_PER_EPOCH),
        }
    )
    page.define("SIGReg", "ViTEncoder")
    with mock.patch.object(torch, "float32", torch.float64):
        sigreg = page.names["SIGReg"]().double()
    net = page.names["ViTEncoder"](proj_dim=16).double()
    load_ours(net, method)
    page.names |= {"net": net, "sigreg": sigreg}
    page.define("g1")
    optimizer = torch.optim.AdamW([page.names["g1"]])
    page.names["opt"] = optimizer
    page.define("warmup_steps", "total_steps", "s1", "s2", "scheduler")
    for step in range(NUM_STEPS):
        views = load_views(step, num_images, (128,) * 4)
        slices = normality.random_slices(
            16, 256, seed=method.slice_seed, step=step, dtype=torch.float64
        )
        take_our_step(stepper, step, views, EPOCHS)
        page.names["emb"], page.names["proj"] = net(torch.stack(views, dim=1))
        # Their class normalizes the columns again, in place.
        with mock.patch.object(torch, "randn", lambda *_, slices=slices, **__: slices.clone()):
            page.define("inv_loss", "sigreg_loss", "lejepa_loss")
        optimizer.zero_grad()
        page.names["lejepa_loss"].backward()
        optimizer.step()
        page.names["scheduler"].step()
    ours = dict(method.state_dict())
    theirs = rename_theirs(net)
    return largest_difference(
        {name: value for name, value in ours.items() if value.is_floating_point()},
        {name: value for name, value in theirs.items() if value.is_floating_point()},
    )


def rename_theirs(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the page's network under our names, without the canceled biases."""
    # Each group of their projector ends with a dropout of 0.
    prefixes = {
        r"^backbone\.head\.": "embedding.",
        r"^backbone\.": "backbone.model.",
        r"^proj\.([01])\.": r"projector.\1.",
        r"^proj\.4\.": "projector.3.",
        r"^proj\.5\.": "projector.4.",
        r"^proj\.8\.": "projector.6.",
    }
    state = {}
    for name, value in net.state_dict().items():
        pattern = next(pattern for pattern in prefixes if re.match(pattern, name))
        name = re.sub(pattern, prefixes[pattern], name)
        if name not in CANCELED_BIASES:
            state[name] = value
    return state


@torch.no_grad()
def load_ours(net: nn.Module, method: nn.Module) -> None:
    """Copy our initial weights to the page's network. The canceled biases start at 0."""
    for layer in (net.backbone.head, net.proj[0], net.proj[4]):
        layer.bias.zero_()
    ours = method.state_dict()
    for name, value in rename_theirs(net).items():
        value.copy_(ours[name])


def compare_package() -> float:
    """Compare with their package on the ranks of this process's group."""
    sys.path.insert(0, str(OFFICIAL))
    package = importlib.import_module("lejepa")
    torch.set_default_dtype(torch.float64)  # their slices have it
    recipe = OptimConfig(
        name="adamw",
        base_lr=0.0005,
        lr_scaling="none",
        warmup_epochs=0,
        final_lr_ratio=1.0,
        weight_decay=0.05,
        exclude_by="none",
    )
    config = Config(embedding_dim=24, projector_dims=[32, 32, 16], num_slices=64)
    backbone = BackboneConfig(name="test_vit", args={"depth": 2, "patch_size": 8})
    num_images, rank, world_size = 12, process_group.rank(), process_group.world_size()
    stepper = build_our_stepper(config, backbone, 64, recipe, num_images)
    torch.manual_seed(0)
    theirs = config.build(backbones.build(backbone, 64)).double()
    with mock.patch.object(torch, "float32", torch.float64):
        statistic = package.univariate.EppsPulley()
    sigreg = package.multivariate.SlicingUnivariateTest(statistic, num_slices=64)

    def their_slices(dim: int, num_slices: int, *, step: Any, **_: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(step))
        slices = torch.randn(dim, num_slices, generator=generator)
        return slices / slices.norm(dim=0)

    network = DistributedDataParallel(theirs) if world_size > 1 else theirs
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0005, weight_decay=0.05)
    for step in range(NUM_STEPS):
        views = [
            view.chunk(world_size)[rank] for view in load_views(step, num_images, (64, 64, 32, 32))
        ]
        with mock.patch.object(normality, "random_slices", their_slices):
            take_our_step(stepper, step, views, 10)
        indices = torch.arange(len(views[0]))
        z = network(Batch(views, indices, indices))["z"].transpose(0, 1)
        prediction = (z[:2].mean(0) - z).square().mean()
        loss = 0.05 * sigreg(z) + 0.95 * prediction
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_default_dtype(torch.float32)
    return largest_difference(
        {name: p.detach() for name, p in stepper.method.named_parameters()},
        {name: p.detach() for name, p in theirs.named_parameters()},
    )


def main() -> None:
    comparisons: dict[str, Callable[[], float]] = {"MINIMAL.md": compare_minimal}
    for size in (1, 2, 3):
        name = f"package, {size} rank{'s' * (size > 1)}"
        comparisons[name] = lambda size=size: max(run_ranks(compare_package, world_size=size))
    for name, compare in comparisons.items():
        print(f"{name}: {NUM_STEPS} steps, largest relative difference {compare():.1e}", flush=True)


if __name__ == "__main__":
    main()
