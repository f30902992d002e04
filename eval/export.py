"""Export the backbone of a run to a folder that can be loaded without the run.

`load(OUT)` returns the exported backbone.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.eval import command_line, results, spectrum
from ssl_pretrain.eval.exporting import (
    export_formats,
    model_card,
    onnx,
    open_clip_folder,
    reload,
)
from ssl_pretrain.eval.exporting.export_folder import digests, is_export, load
from ssl_pretrain.eval.exporting.export_formats import PREPROCESSING_FILE
from ssl_pretrain.eval.exporting.reference import (
    ARGUMENTS_FILE,
    REFERENCE_FILE,
    WEIGHTS,
    architecture_facts,
    check,
    read_arguments,
    reference_images,
)
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.eval.runs import Run, on_cpu
from ssl_pretrain.models import timm_networks
from ssl_pretrain.system import durable_files

__all__ = ["check", "export", "load", "load_transform"]

NUM_COLLAPSE_IMAGES = 512  # training images whose features are tested for collapse
# Smallest accepted effective rank of the centered features, and smallest accepted spread of the
# features scaled to length 1. Features below either limit have collapsed to a line or a point.
MIN_EFFECTIVE_RANK, MIN_SPREAD = 2.0, 0.01
HELP = f"""Export the backbone of a run, without the projector, or both towers of clip and siglip.

{WEIGHTS}: weights under timm's names, which for ResNets are also torchvision's.
{ARGUMENTS_FILE}: the arguments that build the network, and the checksum of every file.
{REFERENCE_FILE}: images and their features. Weights can load without an error into the wrong
network, for example weights for 12 attention heads into a network with 6. The features reveal it.
{PREPROCESSING_FILE}: the transform of the evaluations, with Pillow, NumPy and torch alone.
README.md: a model card with the configuration, results and checksums, as the Hugging Face Hub
shows it.
Each format is loaded in another process, and a format with other features is an error.
Untrained weights are refused, and so are features that are the same for all images.

    # write to runs/demo/export, for timm, transformers and torch.hub
    python -m ssl_pretrain.eval.export runs/demo
    # also check that torchvision loads the weights
    python -m ssl_pretrain.eval.export runs/imagenet exported/simclr --format timm torchvision
    # both towers of a run of clip or siglip, for open_clip
    python -m ssl_pretrain.eval.export runs/clip exported/clip --format open_clip
    # a program for torch.export.load, and model.onnx and model_int8.onnx with their measurements
    python -m ssl_pretrain.eval.export runs/demo exported/demo --format torch_export onnx

    >>> from ssl_pretrain.eval import export
    >>> backbone = export.load("exported/demo")    # maps normalized images to features
    >>> transform = export.load_transform("exported/demo")
    >>> timm.create_model("local-dir:exported/simclr", pretrained=True)
    >>> transformers.AutoModel.from_pretrained("exported/simclr/transformers")
    >>> torch.hub.load("exported/simclr", "backbone", source="local")
    >>> open_clip.create_model_and_transforms("local-dir:exported/clip")"""

OPTIONS: dict[str, dict[str, Any]] = {
    "--format": {
        "nargs": "+",
        "choices": list(export_formats.DESCRIPTIONS),
        "help": "formats to write and verify (default: timm, transformers and torchhub, as far as "
        "the network has them): "
        + "; ".join(f"{name}: {text}" for name, text in export_formats.DESCRIPTIONS.items()),
    },
    "--force": {
        "action": "store_true",
        "help": "export random or collapsed weights with a warning on the model card",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = command_line.build_parser(
        "ssl_pretrain.eval.export",
        HELP,
        OPTIONS,
        positionals_metavar="OUT",
        positionals_help="new folder or older export to write to (default: RUN/export), and"
        " key=value overrides as in the other evaluations",
    )
    options = parser.parse_intermixed_args(arguments)
    folders = [text for text in options.overrides if "=" not in text]
    options.overrides = [text for text in options.overrides if "=" in text]
    if len(folders) > 1:
        raise ValueError(f"OUT: got {' and '.join(folders)}; give a single folder after RUN")
    run = command_line.open_run(options)
    out = Path(folders[0]) if folders else run.path / "export"
    export(run, out, options.format, options.force)
    print(
        f"exported {run.network} of {run.checkpoint_path.name} to {out}; read {out / 'README.md'}"
    )


def export(
    run: Run, folder: Path, formats: Sequence[str] | None = None, force: bool = False
) -> Path:
    """Write the backbone of a run into a folder, and with the format open_clip its text tower.

    Every format is loaded in another process, and its features are compared with the backbone's.
    An older export is only replaced after that.

    Args:
        run: Run to export.
        folder: New folder or older export.
        formats: Names from `export_formats.DESCRIPTIONS`. None for timm, transformers and torchhub,
            as far as the network has them. Weights, transform and model card are always written.
        force: Export random or collapsed weights with a warning.

    Returns:
        The folder.

    Raises:
        ValueError: If the weights are random, the features have collapsed, the folder contains
            something else, or a format is not possible or does not give the same features.
    """
    source = Path(run.config.backbone.init).parent
    if is_export(source):
        raise ValueError(f"{source}: is an export already; give the run that it was exported from")
    if folder.exists() and any(folder.iterdir()) and not (folder / ARGUMENTS_FILE).exists():
        raise ValueError(f"{folder}: is not empty and contains no export; give a new folder")
    chosen = export_formats.choose(run, formats)
    problems = find_problems(run)
    for problem in problems:
        if not force:
            raise ValueError(
                f"{run.path}: {problem}. Nothing was written; give another --checkpoint, or --force"
                " to export it anyway"
            )
        results.print_progress(f"WARNING: {problem}")
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(run, temporary, chosen, problems)
        _replace_export(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(run: Run, folder: Path, formats: list[str], problems: list[str]) -> None:
    """Write all files of an export into an empty folder and verify its formats."""
    model: Any = run.backbone.model
    weights = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()
    }
    images = reference_images(run.image_size, run.config.views.num_channels)
    image_features = _features_on_cpu(run, images)
    arguments = build_arguments(run) | {"formats": formats}
    reference = {"images": images, "features": image_features}
    if "open_clip" in formats:
        arguments["texts"] = open_clip_folder.reference_texts(run)
        reference["embeddings"] = open_clip_folder.embed(run, images, arguments["texts"])
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    save_file(reference, folder / REFERENCE_FILE)
    arguments["sha256"] = durable_files.sha256(folder / WEIGHTS)
    export_formats.write_files(run, folder, formats, arguments, images)
    onnx_section = (
        onnx.write_models(run, folder, images, image_features) if "onnx" in formats else ""
    )
    _write_arguments(folder, arguments)
    load(folder)
    arguments["reloads"] = {
        name: asdict(result)
        for name, result in reload.verify(folder, formats, ImageTransform.of_run(run)).items()
    }
    card = model_card.render(run, arguments, problems, onnx_section)
    (folder / "README.md").write_text(card, encoding="utf-8")
    checksums = digests(folder)
    del checksums[ARGUMENTS_FILE]  # it has the other checksums and cannot have its own
    arguments["files"] = checksums
    _write_arguments(folder, arguments)
    for path in folder.rglob("*.*"):  # safetensors writes files that only the owner can read
        durable_files.copy_permissions(folder / ARGUMENTS_FILE, path)


def _write_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    text = json.dumps(arguments, indent=1)
    (folder / ARGUMENTS_FILE).write_text(f"{text}\n", encoding="utf-8")


def _features_on_cpu(run: Run, images: Tensor) -> Tensor:
    """Return the features that every format must give, computed on the CPU in float32."""
    with on_cpu(run) as backbone, torch.no_grad():
        features: Tensor = backbone(images)
    return features.float().contiguous()


def _replace_export(folder: Path, temporary: Path) -> None:
    """Move a finished export into its folder. Files of an older export are removed."""
    if not folder.exists():
        temporary.rename(folder)
        return
    for name in export_formats.WRITTEN_NAMES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in temporary.iterdir():
        path.rename(folder / path.name)


def load_transform(folder: str | Path) -> ImageTransform:
    """Return the transform that turns an image into the input of an exported backbone.

    Raises:
        ValueError: If a file of the export is missing.
    """
    view = read_arguments(Path(folder))["input"]
    return ImageTransform(
        view["size"],
        view["crop_ratio"],
        view["interpolation"],
        tuple(view["mean"]),
        tuple(view["std"]),
        PixelFormat(view["channels"], tuple(map(float, view["range"])) or None),
    )


def build_arguments(run: Run) -> dict[str, Any]:
    """Return the entries of ARGUMENTS_FILE: the network, its input format and its origin."""
    config, evaluation = run.config, run.config.evaluation
    name, args = config.backbone.name, dict(config.backbone.args)
    size_arguments = timm_networks.size_arguments(name, run.view_size)
    return {
        "architecture": name,
        "stem": config.backbone.stem,
        "args": args,
        "built_for": run.view_size,
        "create_model": size_arguments | {"num_classes": 0} | args,
        "facts": architecture_facts(run.backbone),
        "input": {
            "channels": config.data.channels,
            "range": list(config.data.range),
            "size": run.image_size,
            "crop_ratio": evaluation.crop_ratio,
            "interpolation": evaluation.interpolation,
            "mean": list(config.views.mean),
            "std": list(config.views.std),
        },
        "precision": config.parallel.precision,
        "method": config.method.name,
        **run.provenance(),
    }


def find_problems(run: Run) -> list[str]:
    """Return the reasons why an export would be worthless, such as collapsed features."""
    problems = []
    initial_weights = dict(features.random_backbone(run).named_parameters())
    if all(
        torch.equal(initial_weights[name], value) for name, value in run.backbone.named_parameters()
    ):
        problems.append(
            f"every weight still has its initial value from seed {run.config.seed}, so this is a"
            f" random backbone (step {run.step})"
        )
    try:
        source = evaluation_split.open_images(run, "train")
    except (ValueError, OSError) as error:
        results.print_progress(
            f"not checked for collapse, because the training images are missing: {error}"
        )
        return problems
    images = evaluation_split.EvaluationSplit(run, source).random_subset(NUM_COLLAPSE_IMAGES)
    image_features, _ = features.extract(run.backbone, images)
    deviations = spectrum.covariance_spectrum(image_features).sqrt()
    shares = deviations / deviations.sum().clamp(min=1e-12) + 1e-12
    effective_rank = torch.exp(-(shares * shares.log()).sum()).item()  # RankMe, arXiv:2210.02885
    spread = deviations.norm().item()
    if not (effective_rank >= MIN_EFFECTIVE_RANK and spread >= MIN_SPREAD):
        problems.append(
            f"the features of {len(images)} training images have collapsed: effective rank"
            f" {effective_rank:.1f} of {image_features.shape[1]} (must be at least"
            f" {MIN_EFFECTIVE_RANK:g}), spread {spread:.2g} (must be at least {MIN_SPREAD:g})"
        )
    return problems


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.export")
