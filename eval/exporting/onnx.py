"""A backbone as ONNX: checked against torch, and once more in 8 bits with its accuracy and latency beside the full one's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain import rng
from ssl_pretrain.eval import knn, results
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.runs import Run

FULL, SMALL = "model.onnx", "model_int8.onnx"
SAME = 1e-4  # of the largest feature, between onnxruntime and torch
CALIBRATION = 256  # training images that set the ranges of 8-bit activations
MOST = 10_000  # images of each part that the accuracy is measured on
TIMED = 30  # images, one at a time
INSTALL = "pip install 'ssl_pretrain[onnx]'"

Embed = Callable[[Tensor], Tensor]  # normalized images -> features, both on the CPU


def require() -> None:
    """Nothing where the packages are there, else ValueError with the install line."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--format onnx: {error.name} is not installed; {INSTALL}") from None


def write(run: Run, folder: Path, images: Tensor, expected: Tensor) -> dict[str, Any]:
    """Writes model.onnx and model_int8.onnx, and returns what was measured: `rows` of a table and `notes`.

    Raises:
        ValueError: onnxruntime gives other features than torch does.
    """
    require()
    model = run.backbone.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    convert(model, images, folder / FULL)
    full = session(folder / FULL)
    differs = (full(images) - expected).abs().max().item()
    if not differs <= SAME * expected.abs().max().item():
        largest = expected.abs().max().item()
        raise ValueError(
            f"{folder / FULL}: its features differ from torch's by {differs:.2g}, where the largest is {largest:.2g}"
        )
    train = evaluation_split.open_source(run.config.data, "train")
    mixed = rng.permutation(0, 0, len(train), rng.Purpose.SUBSET)
    kind = quantize(folder, run, Part(run, train, mixed[:CALIBRATION]))
    with torch.no_grad():
        embeds: dict[str, Embed] = {
            "torch, 32 bits": model,
            "onnx, 32 bits": full,
            "onnx, 8 bits": session(folder / SMALL),
        }
        milliseconds = latencies(embeds, images)
        accuracy, how = accuracies(run, embeds)
    sizes = {"onnx, 32 bits": FULL, "onnx, 8 bits": SMALL}
    rows = [
        {
            "name": name,
            "accuracy": f"{accuracy[name]:.1f}" if name in accuracy else "-",
            "latency": f"{milliseconds[name]:.2f}",
            "megabytes": f"{(folder / sizes[name]).stat().st_size / 1e6:.2f}"
            if name in sizes
            else "-",
        }
        for name in embeds
    ]
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("onnx", "onnxruntime", "torch")
    )
    notes = [
        f"Largest difference of onnxruntime's features from torch's: {differs:.1e}. 8 bits: {kind}.",
        f"k-NN: {how}.",
        f"Latency: one image of {run.image_size} pixels on a CPU, median of {TIMED}; {torch.get_num_threads()} threads; {versions}.",
    ]
    for row in rows:
        results.say(
            f"{row['name']}: k-NN {row['accuracy']} %, {row['latency']} ms, {row['megabytes']} MB"
        )
    return {"rows": rows, "notes": notes}


def convert(model: nn.Module, images: Tensor, path: Path) -> None:
    """torch.onnx's export of images (n, 3, size, size) to features (n, feature_dim), any n."""
    batch = {0: torch.export.Dim("n", min=1)}
    torch.onnx.export(
        model, (images,), str(path), input_names=["images"], output_names=["features"], dynamic_shapes=({**batch},),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip


def session(path: Path) -> Embed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(
        opened.run(None, {"images": images.contiguous().numpy()})[0]
    )


def quantize(folder: Path, run: Run, calibration: Part) -> str:
    """Writes the 8-bit model; returns how, in words. Convolutions have fixed ranges, a ViT's matrices those of each input."""
    import onnxruntime.quantization as quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / ".prepared.onnx"
    quant_pre_process(str(folder / FULL), str(prepared), skip_symbolic_shape=True)
    try:
        if hasattr(run.backbone.model, "blocks"):
            quantization.quantize_dynamic(
                str(prepared),
                str(folder / SMALL),
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
            )
            return "weights of matrix products a channel, activations by each input's range (onnxruntime's quantize_dynamic)"
        quantization.quantize_static(
            str(prepared), str(folder / SMALL), _Reader(run, calibration), per_channel=True,
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return f"weights a channel, activations by the range over {len(calibration)} training images (onnxruntime's quantize_static, QDQ)"
    finally:
        prepared.unlink(missing_ok=True)


class _Reader:
    """The calibration images as onnxruntime asks for them: one batch a call, None after the last."""

    def __init__(self, run: Run, part: Part):
        self.batches: Iterator[Tensor] = (
            features.normalize(run, images).cpu() for images, _ in part.batches()
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self.batches, None)
        return None if images is None else {"images": images.contiguous().numpy()}


def latencies(embeds: dict[str, Embed], images: Tensor) -> dict[str, float]:
    """Median milliseconds of one image, the candidates in turn, so that a slow moment hits all alike."""
    taken: dict[str, list[float]] = {name: [] for name in embeds}
    for _ in range(TIMED + 1):
        for name, embed in embeds.items():
            began = time.perf_counter()
            embed(images[:1])
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def accuracies(run: Run, embeds: dict[str, Embed]) -> tuple[dict[str, float], str]:
    """k-NN accuracy in percent of each, and how; nothing for images without labels."""
    try:
        train, test = evaluation_split.labelled_parts(run, "k-NN")
    except ValueError as error:
        results.say(str(error))
        return {}, "not measured, as there are no labelled test images"
    k, temperature = run.config.evaluation.k, run.config.evaluation.temperature
    bank, queries = (Part(run, part.source, _some(len(part))) for part in (train, test))
    reached = {}
    for name, embed in embeds.items():
        (found, labels), asked = _embedded(run, bank, embed), _embedded(run, queries, embed)
        reached[name] = knn.Search(found, labels, len(train.classes), "torch").accuracies(
            *asked, [(k, temperature)]
        )[0]
    return (
        reached,
        f"k {k}, temperature {temperature}, {len(queries):,} test images among {len(bank):,} training images",
    )


def _some(n: int) -> np.ndarray:
    return np.sort(rng.permutation(0, 0, n, rng.Purpose.SUBSET)[:MOST])


def _embedded(run: Run, part: Part, embed: Embed) -> tuple[Tensor, Tensor]:
    found = [
        (embed(features.normalize(run, images).cpu()), labels) for images, labels in part.batches()
    ]
    return torch.cat([each for each, _ in found]), torch.cat([labels for _, labels in found])
