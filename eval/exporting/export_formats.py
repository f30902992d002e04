"""The formats of an export: which of them a network has, and the files of each."""

from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.eval.exporting import (
    onnx,
    open_clip_folder,
    open_clip_limits,
    timm_config,
    transformers_folder,
)
from ssl_pretrain.eval.exporting.reference import ARGUMENTS_FILE, REFERENCE_FILE, WEIGHTS
from ssl_pretrain.eval.results import print_progress
from ssl_pretrain.eval.runs import Run, on_cpu
from ssl_pretrain.models import custom_network
from ssl_pretrain.system import optional_packages

DESCRIPTIONS = {
    "timm": 'timm.create_model("local-dir:OUT", pretrained=True)',
    "timm_wrapper": "transformers.AutoModel, which wraps timm's network, for any network of timm",
    "transformers": "transformers.AutoModel, with its own ViT, DINOv2, I-JEPA, ResNet or ConvNeXt",
    "torchhub": 'torch.hub.load("OUT", "backbone", source="local")',
    "torch_export": "a program for torch.export.load, which needs no other package",
    "torchvision": "the weights in torchvision's ResNet of the same name",
    "onnx": "models for ONNX Runtime in 32 and 8 bits",
    "open_clip": 'both towers of clip or siglip, for open_clip.create_model("local-dir:OUT")',
}
DEFAULT_FORMATS = ("timm", "transformers", "torchhub")
PROGRAM_FILE = "model.pt2"
PREPROCESSING_FILE, HUB_FILE = "preprocessing.py", "hubconf.py"
OWN_FOLDER = Path(__file__).parent
# Entries of a folder that an export replaces.
WRITTEN_NAMES = (
    *(WEIGHTS, ARGUMENTS_FILE, REFERENCE_FILE, "README.md"),
    *(PREPROCESSING_FILE, HUB_FILE, PROGRAM_FILE, timm_config.FILE),
    *(onnx.FLOAT_MODEL, onnx.INT8_MODEL, transformers_folder.FOLDER_NAME),
    *(open_clip_folder.CONFIG_FILE, open_clip_folder.WEIGHTS_FILE),
)


def choose(run: Run, requested: Sequence[str] | None) -> list[str]:
    """Return the formats to write.

    Args:
        run: Run to export.
        requested: Formats that the user named, or None for every default that the network has.
            What is left out is printed.

    Raises:
        ValueError: If a requested format is not possible. The message has the reason.
    """
    if requested is not None:
        for name in requested:
            if problem := find_problem(run, name):
                raise ValueError(f"--format {name}: {problem}")
        return list(dict.fromkeys(requested))
    chosen = []
    for name in DEFAULT_FORMATS:
        if problem := find_problem(run, name):
            print_progress(f"not written: --format {name}: {problem}")
        else:
            chosen.append(name)
    return chosen


def find_problem(run: Run, name: str) -> str:
    """Return why a format is not possible for a run, with a remedy, or an empty string."""
    if name == "onnx":
        return _find_missing_package(onnx.PACKAGES, "onnx")
    if name == "open_clip":
        problem = _find_missing_package(("open_clip",), "text")
        return problem or open_clip_limits.find_problem(run)
    if name == "torch_export":
        return ""
    if name == "torchvision":
        return _find_torchvision_problem(run)
    architecture, stem = run.config.backbone.name, run.config.backbone.stem
    if custom_network.is_custom(architecture):
        return (
            f"{architecture} is a network of your own, which timm and transformers do not have; use"
            " torch_export or onnx, or load it with eval.export.load"
        )
    if name == "torchhub":
        return ""
    if stem != "imagenet":
        return (
            f"timm's {architecture} has the imagenet stem, but this backbone has the {stem} stem;"
            " use torchhub, torch_export or onnx, or load it with eval.export.load"
        )
    if name == "timm":
        return ""
    if problem := _find_missing_package(("transformers",), "huggingface"):
        return problem
    if name == "timm_wrapper":
        return ""
    model: Any = run.backbone.model
    if problem := transformers_folder.find_problem(model, run.image_size):
        return (
            f"transformers has no class of its own for {architecture}, which {problem}; use"
            " timm_wrapper, for which AutoModel.from_pretrained builds timm's network"
        )
    return ""


def _find_missing_package(packages: Sequence[str], extra: str) -> str:
    for package in packages:
        if not optional_packages.is_installed(package):
            return f"{package} is not installed; {optional_packages.install_hint(extra)}"
    return ""


def _find_torchvision_problem(run: Run) -> str:
    import torchvision

    name, stem = run.config.backbone.name, run.config.backbone.stem
    is_resnet = name.startswith(("resnet", "wide_resnet", "resnext"))
    if not is_resnet or name not in torchvision.models.list_models(module=torchvision.models):
        return (
            f"torchvision has no {name} that takes timm's weights; use this format for ResNets,"
            " such as resnet50"
        )
    if stem != "imagenet":
        return (
            f"torchvision's {name} has the imagenet stem, but this backbone has the {stem} stem;"
            " load it with eval.export.load"
        )
    if run.config.data.channels != 3:
        return (
            f"torchvision's {name} takes 3 channels, but this backbone takes"
            f" {run.config.data.channels} (data.channels); load it with eval.export.load"
        )
    return ""


def write_files(
    run: Run, folder: Path, formats: Sequence[str], arguments: dict[str, Any], images: Tensor
) -> None:
    """Write the files of all formats but ONNX, and add the entries of `arguments` that they need.

    Args:
        run: Run to export.
        folder: Folder with the weights.
        formats: Formats to write.
        arguments: Content of timm.json.
        images: Reference images.
    """
    model: Any = run.backbone.model
    copyfile(OWN_FOLDER / PREPROCESSING_FILE, folder / PREPROCESSING_FILE)
    if {"timm", "timm_wrapper"} & set(formats):
        timm_config.write(folder, model, arguments)
    if "torchhub" in formats:
        copyfile(OWN_FOLDER / HUB_FILE, folder / HUB_FILE)
    if "transformers" in formats:
        arguments["transformers_features"] = transformers_folder.write(
            folder / transformers_folder.FOLDER_NAME, model, arguments["input"]
        )
    if "open_clip" in formats:
        open_clip_folder.write(run, folder, arguments["input"])
    if "torch_export" in formats:
        write_program(run, folder / PROGRAM_FILE, images)


def write_program(run: Run, path: Path, images: Tensor) -> None:
    """Write the program of torch.export that maps images (n, C, h, w) to features, for any n."""
    with on_cpu(run) as model, torch.no_grad():
        program = torch.export.export(
            model, (images,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)
        )
        torch.export.save(program, path)  # the program shares the weights, which move back
