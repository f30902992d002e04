"""k-NN accuracy on corrupted test images."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.eval import command_line, corruptions, results
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.schema import NON_NEGATIVE_INT
from ssl_pretrain.schema.image_sizes import describe, height_and_width

HELP = f"""k-NN accuracy of frozen features on corrupted test images, at five severities.

The corruptions are those of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019),
applied to the evaluation views of the test images:
{", ".join(corruptions.NAMES[:7])},
{", ".join(corruptions.NAMES[7:])}.
Neighbors come from the clean training images, and nothing is trained. The result is printed and
saved to RUN/eval/robustness.json. Its row `pretrained` is the mean over corruptions.

    python -m ssl_pretrain.eval.robustness runs/demo
    python -m ssl_pretrain.eval.robustness runs/demo --corruptions fog contrast --max-images 500"""

OPTIONS: dict[str, dict[str, Any]] = {
    "--corruptions": {
        "nargs": "+",
        "default": list(corruptions.NAMES),
        "metavar": "NAME",
        "help": "corruptions to apply (default: all)",
    },
    "--max-images": {
        "type": NON_NEGATIVE_INT,
        "default": 2000,
        "help": "size of the random test subset, the same every time (default: 2000; 0 uses all)",
    },
}


def main(arguments: list[str]) -> None:
    """Evaluate the run that the command line names, and print the result."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.robustness", HELP, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.corruptions, options.max_images),
    )


def evaluate(run: Run, corruption_names: list[str], max_images: int = 2000) -> dict[str, Any]:
    """Measure the accuracy per corruption and severity, and save it to RUN/eval/robustness.json.

    Args:
        run: Run to evaluate.
        corruption_names: Corruptions to apply, from `corruptions.NAMES`.
        max_images: Size of the random test subset, the same every time. 0 uses all test images.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, a corruption is unknown, or k is larger than the
            number of training images.
    """
    start = time.monotonic()
    if unknown := [name for name in corruption_names if name not in corruptions.NAMES]:
        raise ValueError(
            f"--corruptions: {unknown[0]!r} is unknown; choose among:"
            f" {', '.join(corruptions.NAMES)}"
        )
    train, test = labeled_splits(run, "the robustness evaluation")
    if max_images and max_images < len(test):
        test = test.random_subset(max_images)
    evaluation = run.config.evaluation
    bank, bank_labels = features.extract(run.backbone, train)

    def measure_accuracy(name: str, severity: int) -> float:
        queries, labels = extract_corrupted_features(run, test, name, severity)
        predictions = weighted_knn.predict(
            bank,
            bank_labels,
            queries,
            k=evaluation.k,
            temperature=evaluation.temperature,
            num_classes=len(train.classes),
        )
        return 100 * (predictions == labels).double().mean().item()

    rows = []
    for name in corruption_names:
        accuracies = [measure_accuracy(name, severity) for severity in corruptions.SEVERITIES]
        by_severity = dict(zip(map(str, corruptions.SEVERITIES), accuracies))
        rows.append(results.Row(name, {"mean": float(np.mean(accuracies)), **by_severity}))
        results.print_progress(f"{name}: {' '.join(f'{value:.1f}' for value in accuracies)}")
    means = {
        column: float(np.mean([row.metrics[column] for row in rows])) for column in rows[0].metrics
    }
    clean = results.Row("clean", {"mean": measure_accuracy("", 0)})
    is_small = max(height_and_width(run.image_size)) <= corruptions.MAX_SMALL_IMAGE_SIDE
    benchmark = "CIFAR-10-C" if is_small else "ImageNet-C"
    protocol = {
        **describe_splits(run, train, test),
        "k": evaluation.k,
        "temperature": evaluation.temperature,
        "corruptions": f"{len(rows)} at severities 1 to 5, with the constants of {benchmark},"
        f" applied to evaluation views of {describe(run.image_size)} pixels",
        **_describe_channels(run, corruption_names),
        "mean": f"over severities, and in the row `pretrained` also over {len(rows)} corruptions",
    }
    return results.save(
        run.path,
        "robustness",
        protocol,
        [clean, *rows, results.Row("pretrained", means)],
        run.provenance(),
        time.monotonic() - start,
        measure="k-NN accuracy, %",
    )


def _describe_channels(run: Run, corruption_names: list[str]) -> dict[str, str]:
    """Return an entry of the protocol about JPEG and brightness, unless the images are RGB."""
    num_channels = run.config.views.num_channels
    if num_channels == 3:
        return {}
    notes = {
        "jpeg_compression": "each channel is a gray JPEG",
        "brightness": "the HSV value is the largest of the channels",
    }
    notes = {name: note for name, note in notes.items() if name in corruption_names}
    text = "; ".join(f"{name}: {note}" for name, note in notes.items())
    return {"channels": f"{num_channels}{f'; {text}' if text else ''}"}


def extract_corrupted_features(
    run: Run, split: EvaluationSplit, name: str, severity: int
) -> tuple[Tensor, Tensor]:
    """Return features and labels of the corrupted images, or of the clean ones for name ""."""
    batches, start = [], 0
    for images, labels in split.batches():
        if name:
            indices = split.indices[start : start + len(images)].tolist()
            corrupted_images = [
                corruptions.apply(name, image, severity, index)
                for image, index in zip(images.permute(0, 2, 3, 1).numpy(), indices)
            ]
            images = torch.from_numpy(np.stack(corrupted_images)).permute(0, 3, 1, 2)
        start += len(images)
        views = features.normalize(run, images)
        batches.append((features.compute(run, run.backbone, views), labels))
    return features.concatenate(batches, run.device)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.robustness")
