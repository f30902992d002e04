"""The backbone of a run alone, in a folder that loads anywhere: `python -m ssl_pretrain.eval.export RUN OUT`; `load(OUT)` gives it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain import rng
from ssl_pretrain.data.sources import open_source
from ssl_pretrain.eval import results, runs, spectrum
from ssl_pretrain.eval.exporting import model_card, onnx
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import Backbone, BackboneConfig
from ssl_pretrain.system import durable_files

WEIGHTS, ARGUMENTS, REFERENCE = "model.safetensors", "timm.json", "reference.safetensors"
FORMATS = ("timm", "torchvision", "onnx")
REFERENCE_IMAGES = 2
SAME = 1e-3  # of the largest feature: another processor's rounding is a hundred times smaller, another network's a hundred times larger
PROBED = 512  # training images whose features have to differ
LEAST_RANK, LEAST_SPREAD = (
    2.0,
    0.01,
)  # RankMe of centred features, and their deviation at length 1; below either they are one point or line
HELP = f"""Writes the backbone of a run, without projector and optimizer, as a folder that loads anywhere.

{WEIGHTS}: its weights under timm's names, which are torchvision's for ResNets. {ARGUMENTS}: the arguments that build it.
{REFERENCE}: an input and its features: weights may load into another network without a complaint, such as those of
12 heads into 6, and this shows it. README.md: a card with the configuration, what was measured, and checksums.
Weights that the seed gives before the first step, and features that are the same for all images, are refused.

    python -m ssl_pretrain.eval.export runs/demo                                # to runs/demo/export
    python -m ssl_pretrain.eval.export runs/simclr_imagenet exported/simclr --format torchvision    # checked there too
    python -m ssl_pretrain.eval.export runs/demo exported/demo --format onnx    # and model.onnx and model_int8.onnx, checked and measured

    >>> from eval import export
    >>> backbone = export.load("exported/demo")    # images (n, 3, size, size), normalized as the card says -> features
    >>> timm.create_model("resnet50", num_classes=0, checkpoint_path="exported/simclr/model.safetensors")"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.export", HELP)
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="folder to write: new, or an older export (default: RUN/export)",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["timm"],
        help="what else to write or check (default: timm)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="export random or collapsed weights all the same; the card says so",
    )
    options = parser.parse_intermixed_args(arguments)
    out, options.overrides = _out_first(options.out, options.overrides)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    folder = export(run, Path(out) if out else run.path / "export", options.format, options.force)
    print(
        f"exported {run.network} of {run.checkpoint_path.name} to {folder}; read {folder / 'README.md'}"
    )


def _out_first(out: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """argparse gives OUT among RUN key=value ... to the wrong name: it is the one without an equals sign, if there is one."""
    given = [*overrides, *([out] if out else [])]
    folders = [text for text in given if "=" not in text]
    if len(folders) > 1:
        raise ValueError(f"give RUN and one OUT, and key=value after them; got {' '.join(given)!r}")
    return folders[0] if folders else None, [text for text in given if "=" in text]


def export(run: Run, folder: Path, formats: list[str] | None = None, force: bool = False) -> Path:
    """Writes the folder and returns it; see HELP.

    Raises:
        ValueError: the weights are random or the features collapsed (unless `force`), torchvision has no such network, the folder
            holds something else, or onnx is not installed.
    """
    formats = formats or ["timm"]
    if "onnx" in formats:
        onnx.require()
    if folder.exists() and any(folder.iterdir()) and not (folder / ARGUMENTS).exists():
        raise ValueError(f"{folder}: is not empty and holds no export; give a new folder")
    backbone: Any = run.backbone
    model: nn.Module = backbone.model
    doubts = doubts_about(run)
    for doubt in doubts:
        if not force:
            raise ValueError(
                f"{run.path}: {doubt}. Nothing was written; give another --checkpoint, or --force to export it all the same"
            )
        results.say(f"WARNING: {doubt}")
    weights = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    images = reference_input(run.image_size)
    with torch.no_grad():
        found = run.backbone(images.to(run.device)).float().cpu().contiguous()
    if "torchvision" in formats:
        check_torchvision(run, weights, images, found)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    save_file({"images": images, "features": found}, folder / REFERENCE)
    (folder / ARGUMENTS).touch()
    for file in (WEIGHTS, REFERENCE):  # safetensors makes 0600
        durable_files.copy_mode(folder / ARGUMENTS, folder / file)
    written = arguments_of(run) | {"sha256": _sha256(folder / WEIGHTS), "formats": formats}
    (folder / ARGUMENTS).write_text(json.dumps(written, indent=1) + "\n")
    load(folder)
    measured = onnx.write(run, folder, images, found) if "onnx" in formats else None
    (folder / "README.md").write_text(model_card.text(run, written, doubts, measured))
    return folder


def load(folder: str | Path) -> Backbone:
    """The exported backbone in evaluation mode on the CPU, with 100 % of its weights, giving the features it gave when exported.

    Raises:
        ValueError: a file is missing or damaged, a key is missing or unexpected, or the features are others.
    """
    folder = Path(folder)
    absent = [name for name in (WEIGHTS, ARGUMENTS, REFERENCE) if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder}: {', '.join(absent)} is missing; give a folder that eval.export wrote"
        )
    written = json.loads((folder / ARGUMENTS).read_text())
    if _sha256(folder / WEIGHTS) != written["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged: its SHA-256 is not that of {ARGUMENTS}; copy or export it again"
        )
    config = BackboneConfig(written["architecture"], written["stem"], args=written["args"])
    backbone = backbones.build(config, written["built_for"])
    backbones.load_strict(backbone, load_file(folder / WEIGHTS), str(folder / WEIGHTS), exact=True)
    check(backbone, folder)
    return backbone.eval()


@torch.no_grad()
def check(model: nn.Module, folder: str | Path) -> None:
    """Nothing, if `model` (images to features, on the CPU) gives the features of the exported one on the reference input.

    Raises:
        ValueError: it does not, though its weights may have loaded strictly; says by how much and what to compare.
    """
    reference = load_file(Path(folder) / REFERENCE)
    found, expected = model.eval()(reference["images"]), reference["features"]
    if found.shape != expected.shape:
        shapes = f"features {tuple(found.shape)}, the exported one {tuple(expected.shape)}"
        raise ValueError(f"{folder}: the model gives {shapes}; set num_classes=0")
    largest, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not largest <= SAME * scale:
        written = json.loads((Path(folder) / ARGUMENTS).read_text())
        facts = ", ".join(f"{key} {value}" for key, value in written["facts"].items())
        raise ValueError(
            f"{folder}: the weights loaded, and the features differ by {largest:.2g} where the largest is {scale:.2g}: this is another"
            f" network than the exported one. It has stem {written['stem']}, {facts}; build it with {ARGUMENTS}, or by eval.export.load"
        )


def arguments_of(run: Run) -> dict[str, Any]:
    """What builds the backbone again, and what it is fed."""
    config, evaluation = run.config, run.config.evaluation
    args = dict(config.backbone.args)
    call = {"num_classes": 0, **args}
    call = backbones.size_arguments(config.backbone.name, run.view_size) | call
    return {
        "architecture": config.backbone.name,
        "stem": config.backbone.stem,
        "args": args,
        "built_for": run.view_size,
        "create_model": call,
        "facts": facts(run.backbone),
        "input": {
            "size": run.image_size,
            "crop_ratio": evaluation.crop_ratio,
            "interpolation": evaluation.interpolation,
            "mean": list(config.views.mean),
            "std": list(config.views.std),
        },
        "method": config.method.name,
        "checkpoint": run.checkpoint_path.name,
        "step": run.step,
        "network": run.network,
    }


def facts(backbone: nn.Module) -> dict[str, Any]:
    """Facts about the network that its weights do not hold: heads, epsilon, pooling, positions."""
    model: Any = backbone.model
    about: dict[str, Any] = {"feature_dim": backbone.feature_dim}
    heads = sorted(
        {
            module.num_heads
            for module in model.modules()
            if isinstance(getattr(module, "num_heads", None), int)
        }
    )
    if heads:
        about["num_heads"] = heads[0] if len(heads) == 1 else heads
    if (patch := getattr(getattr(model, "patch_embed", None), "patch_size", None)) is not None:
        about["patch_size"] = list(patch) if isinstance(patch, Sequence) else patch
    if hasattr(model, "pos_embed"):
        about["positions"] = (
            list(model.pos_embed.shape) if isinstance(model.pos_embed, Tensor) else None
        )
    if hasattr(model, "cls_token"):
        about["class_token"] = model.cls_token is not None
    if hasattr(model, "global_pool"):
        pool = model.global_pool
        about["pooling"] = (
            pool if isinstance(pool, str) else getattr(pool, "pool_type", type(pool).__name__)
        )
    about["norm_eps"] = sorted(
        {
            float(module.eps)
            for module in model.modules()
            if isinstance(getattr(module, "eps", None), float)
        }
    )
    return about


def reference_input(size: int) -> Tensor:
    """Smooth noise, float32 (REFERENCE_IMAGES, 3, size, size) of deviation about 1: the same everywhere, and nobody's photograph."""
    images = np.arange(REFERENCE_IMAGES)
    coarse = rng.uniform(0, 0, images, 0, rng.Purpose.SUBSET, 3 * 8 * 8)
    coarse = coarse.reshape(REFERENCE_IMAGES, 3, 8, 8)
    fine = rng.uniform(0, 1, images, 0, rng.Purpose.SUBSET, 3 * size * size)
    fine = fine.reshape(REFERENCE_IMAGES, 3, size, size)
    smooth = F.interpolate(torch.from_numpy(coarse), (size, size), mode="bilinear")
    return (4 * (smooth - 0.5) + (torch.from_numpy(fine) - 0.5)).float()


def check_torchvision(
    run: Run, weights: dict[str, Tensor], images: Tensor, expected: Tensor
) -> None:
    """Nothing, if torchvision's network of this name loads the weights strictly and gives these features.

    Raises:
        ValueError: it has no such network, another stem, other keys, or gives other features.
    """
    import torchvision

    name, stem = run.config.backbone.name, run.config.backbone.stem
    if name not in torchvision.models.list_models(module=torchvision.models) or not name.startswith(
        ("resnet", "wide_resnet", "resnext")
    ):
        raise ValueError(
            f"--format torchvision: it has no {name} that takes timm's weights; ResNets it has, such as resnet50"
        )
    if stem != "imagenet":
        raise ValueError(
            f"--format torchvision: its {name} has the imagenet stem, this backbone {stem}; load it with eval.export.load"
        )
    model: Any = torchvision.models.get_model(name, weights=None)
    model.fc = nn.Identity()
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"--format torchvision: its {name} refuses the weights: {str(error).splitlines()[-1].strip()}"
        ) from None
    with torch.no_grad():
        differs = (model.eval()(images) - expected).abs().max().item()
    if not differs <= 1e-5 * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"--format torchvision: its {name} loads the weights and gives features that differ by {differs:.2g}"
        )


def doubts_about(run: Run) -> list[str]:
    """Why these weights may be worth nothing: untouched by training, or blind to what is in an image."""
    found = []
    random = dict(features.random_backbone(run).named_parameters())
    if all(torch.equal(random[name], value) for name, value in run.backbone.named_parameters()):
        found.append(
            f"every weight is what seed {run.config.seed} gives before the first step: a random backbone (step {run.step})"
        )
    try:
        source = open_source(run.config.data, "train")
    except (ValueError, OSError) as error:
        results.say(f"not checked for collapse, as the training images are not there: {error}")
        return found
    chosen = rng.permutation(0, 0, len(source), rng.Purpose.SUBSET)[:PROBED]
    embedded, _ = features.extract(run.backbone, Part(run, source, chosen))
    deviations = spectrum.spectrum(embedded).sqrt()
    shares = deviations / deviations.sum().clamp(min=1e-12) + 1e-12
    rank, spread = torch.exp(-(shares * shares.log()).sum()).item(), deviations.norm().item()
    if not (rank >= LEAST_RANK and spread >= LEAST_SPREAD):
        found.append(
            f"the features of {len(chosen)} training images hardly differ: effective rank {rank:.1f} of {embedded.shape[1]}"
            f" (at least {LEAST_RANK:g}), spread {spread:.2g} (at least {LEAST_SPREAD:g}): collapsed"
        )
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.export")
