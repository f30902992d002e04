"""Export a backbone to ONNX, compare it with torch, and quantize it to 8 bits."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.eval.frozen import features, knn_search
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, labeled_splits, open_images
from ssl_pretrain.eval.results import print_progress
from ssl_pretrain.eval.runs import Run, prepare_for_evaluation
from ssl_pretrain.models import tokens
from ssl_pretrain.schema.image_sizes import describe
from ssl_pretrain.system import markdown, optional_packages

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FLOAT_MODEL, INT8_MODEL = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4  # largest accepted difference from torch, relative to the largest feature
NUM_CALIBRATION_IMAGES = 256  # training images that set the ranges of 8-bit activations
CALIBRATION_BATCH_SIZE = 16  # all activations of a batch are in memory at a time
MAX_IMAGES = 10_000  # largest number of images per split that the accuracies are measured on
NUM_TIMED_IMAGES = 30  # number of times that one image is embedded to measure the latency

ImageEmbedder = Callable[[Tensor], Tensor]  # maps normalized images to features on the CPU


def require_packages() -> None:
    """Raise ValueError with the install command if a package is missing."""
    for package in PACKAGES:
        optional_packages.require("--format onnx", package, "onnx")


def write_models(run: Run, folder: Path, images: Tensor, torch_features: Tensor) -> str:
    """Write model.onnx and model_int8.onnx.

    Args:
        run: Run to export.
        folder: Folder to write to.
        images: Reference images.
        torch_features: Features of these images, computed by torch.

    Returns:
        Section of the model card, with accuracy, latency and size.

    Raises:
        ValueError: If the features of onnxruntime differ from those of torch.
    """
    require_packages()
    run = replace(run, device=torch.device("cpu"))
    model = prepare_for_evaluation(run.backbone, run.device, torch.contiguous_format)
    export_float_model(model, images, folder / FLOAT_MODEL)
    float_session = open_session(folder / FLOAT_MODEL)
    difference = (float_session(images) - torch_features).abs().max().item()
    largest_feature = torch_features.abs().max().item()
    if not difference <= TOLERANCE * largest_feature:
        raise ValueError(
            f"{folder / FLOAT_MODEL}: the features of the exported model differ from torch's by up"
            f" to {difference:.2g}, and the largest feature is {largest_feature:.2g}; do not use"
            " this file, and export without --format onnx"
        )
    quantization = quantize(folder, run)
    embedders: dict[str, ImageEmbedder] = {
        "torch, 32 bits": model,
        "onnx, 32 bits": float_session,
        "onnx, 8 bits": open_session(folder / INT8_MODEL),
    }
    files = {"onnx, 32 bits": folder / FLOAT_MODEL, "onnx, 8 bits": folder / INT8_MODEL}
    with torch.no_grad():
        milliseconds = median_milliseconds(embedders, images)
        accuracies, protocol = measure_accuracies(run, embedders)
    rows = []
    for name in embedders:
        accuracy = f"{accuracies[name]:.1f}" if name in accuracies else "-"
        megabytes = f"{files[name].stat().st_size / 1e6:.2f}" if name in files else "-"
        rows.append([name, accuracy, f"{milliseconds[name]:.2f}", megabytes])
        print_progress(f"{name}: k-NN {accuracy} %, {milliseconds[name]:.2f} ms, {megabytes} MB")
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("onnx", "onnxruntime", "torch")
    )
    notes = (
        f"Largest difference of onnxruntime's features from torch's: {difference:.1e}."
        f" 8 bits: {quantization}.\n"
        f"k-NN: {protocol}.\n"
        f"Latency: one image of {describe(run.image_size)} pixels on a CPU, median of"
        f" {NUM_TIMED_IMAGES}; {torch.get_num_threads()} threads; {versions}."
    )
    table = markdown.table(["", "k-NN, %", "ms per image, median", "MB"], rows)
    return "\n\n".join(["## ONNX", table, notes])


def export_float_model(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write the ONNX model that maps images (n, C, h, w) to features (n, dim), for any n."""
    torch.onnx.export(
        model,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def open_session(path: Path) -> ImageEmbedder:
    """Load an ONNX model into onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def embed(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.contiguous().cpu().numpy()})[0])

    return embed


def computes_ranges_per_input(backbone: nn.Module) -> bool:
    """Return True if an 8-bit model of this backbone needs no calibration images."""
    model: Any = backbone.model
    return tokens.is_transformer(model)


def quantize(folder: Path, run: Run) -> str:
    """Write the 8-bit model, and describe how the ranges of its activations are set.

    A ViT computes them from each input. For other networks, calibration images fix them.
    """
    import onnxruntime.quantization as quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared_path, int8_path = str(folder / ".prepared.onnx"), str(folder / INT8_MODEL)
    quant_pre_process(str(folder / FLOAT_MODEL), prepared_path, skip_symbolic_shape=True)
    # Weights have 7 bits, because processors without VNNI add two products in 16 bits, which
    # overflow with weights of 8 bits.
    weights: dict[str, Any] = {
        "weight_type": quantization.QuantType.QInt8,
        "per_channel": True,
        "reduce_range": True,
    }
    try:
        if computes_ranges_per_input(run.backbone):
            quantization.quantize_dynamic(prepared_path, int8_path, **weights)
            return (
                "weights of matrix products per channel in 7 bits, activations by each input's"
                " range (onnxruntime's quantize_dynamic)"
            )
        train = EvaluationSplit(run, open_images(run, "train"))
        calibration = train.random_subset(NUM_CALIBRATION_IMAGES)
        quantization.quantize_static(
            prepared_path,
            int8_path,
            _CalibrationReader(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            **weights,
        )
        return (
            "weights per channel in 7 bits, activations by the range over"
            f" {len(calibration)} training images (onnxruntime's quantize_static, QDQ)"
        )
    finally:
        Path(prepared_path).unlink(missing_ok=True)


class _CalibrationReader:
    """Calibration images in onnxruntime's protocol: one batch per call, None after the last."""

    def __init__(self, split: EvaluationSplit):
        self.batches: Iterator[Tensor] = (
            features.normalize(split.run, batch)
            for images, _ in split.batches()
            for batch in images.split(CALIBRATION_BATCH_SIZE)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images.contiguous().cpu().numpy()}


def median_milliseconds(embedders: dict[str, ImageEmbedder], images: Tensor) -> dict[str, float]:
    """Measure the median time that each model takes for one image, in milliseconds.

    The models take turns, so that other load on the machine slows all of them alike.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in embedders}
    for _ in range(NUM_TIMED_IMAGES + 1):
        for name, embed in embedders.items():
            start = time.perf_counter()
            embed(images[:1])
            milliseconds[name].append(1000 * (time.perf_counter() - start))
    # The first pass is a warm-up.
    return {name: statistics.median(times[1:]) for name, times in milliseconds.items()}


def measure_accuracies(
    run: Run, embedders: dict[str, ImageEmbedder]
) -> tuple[dict[str, float], str]:
    """Return the k-NN accuracy of each model in percent, and a description of the protocol.

    Without labeled test images there is no accuracy, and the description says so.
    """
    try:
        splits = labeled_splits(run, "k-NN")
    except ValueError as error:
        print_progress(str(error))
        return {}, "not measured, because there are no labeled test images"
    k, temperature = run.config.evaluation.k, run.config.evaluation.temperature
    bank, queries = (split.random_subset(MAX_IMAGES, sort=True) for split in splits)
    accuracies = {}
    for name, embed in embedders.items():
        classifier = knn_search.KnnClassifier(
            *features.extract(embed, bank), len(bank.classes), "torch"
        )
        (accuracies[name],) = classifier.accuracies(
            *features.extract(embed, queries), [(k, temperature)]
        )
    return accuracies, (
        f"k = {k}, temperature {temperature}, {len(queries):,} test images among {len(bank):,}"
        " training images"
    )
