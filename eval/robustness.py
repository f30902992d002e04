"""k-NN accuracy of a run's features on corrupted test images: `python -m ssl_pretrain.eval.robustness RUN`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.eval import corruptions, results, runs
from ssl_pretrain.eval.corruptions import NAMES, SEVERITIES
from ssl_pretrain.eval.frozen import evaluation_split, features
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.schema import FROM_ZERO

HELP = f"""k-NN accuracy of a run's frozen features on test images under common corruptions, at five severities.

The corruptions of ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019), applied here to the evaluation views of the
test images: {", ".join(NAMES)}.
The bank is of clean training images, and nothing is trained. The numbers and their protocol are printed and kept in
RUN/eval/robustness.json; the row `pretrained` is the mean over corruptions.

    python -m ssl_pretrain.eval.robustness runs/demo
    python -m ssl_pretrain.eval.robustness runs/demo --corruptions fog contrast --max-images 500"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.robustness", HELP)
    parser.add_argument(
        "--corruptions", nargs="+", default=list(NAMES), metavar="NAME", help="default: all"
    )
    parser.add_argument(
        "--max-images",
        type=FROM_ZERO,
        default=2000,
        help="test images, a fixed random choice (default: 2000; 0: all)",
    )
    options = parser.parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    result = evaluate(run, options.corruptions, options.max_images)
    print(
        f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/robustness.json'}"
    )


def evaluate(run: Run, names: list[str] | None = None, max_images: int = 2000) -> dict[str, Any]:
    """Accuracy in percent by corruption and severity; see HELP. Kept in RUN/eval/robustness.json.

    Raises:
        ValueError: the images have no labels, there is no such corruption, or k does not fit.
    """
    began = time.monotonic()
    names = list(NAMES) if names is None else names
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"--corruptions: {unknown[0]!r} is none; choose among: {', '.join(NAMES)}")
    train, test = evaluation_split.labelled_parts(run, "the robustness evaluation")
    if max_images and max_images < len(test):
        test = Part(
            run,
            test.source,
            test.numbers[rng.permutation(0, 0, len(test), rng.Purpose.SUBSET)[:max_images]],
        )
    evaluation = run.config.evaluation
    bank, labels = features.extract(run.backbone, train)

    def accuracy(name: str, severity: int) -> float:
        found, truth = extract(run, test, name, severity)
        predicted = weighted_knn.predict(
            bank,
            labels,
            found,
            k=evaluation.k,
            temperature=evaluation.temperature,
            num_classes=len(train.classes),
        )
        return 100 * (predicted == truth).double().mean().item()

    rows = [Row("clean", {"mean": accuracy("", 0)})]
    for name in names:
        each = {str(severity): accuracy(name, severity) for severity in SEVERITIES}
        rows.append(Row(name, {"mean": float(np.mean(list(each.values()))), **each}))
        results.say(f"{name}: " + " ".join(f"{value:.1f}" for value in each.values()))
    rows.append(
        Row(
            "pretrained",
            {
                column: float(np.mean([row.metrics[column] for row in rows[1:]]))
                for column in rows[1].metrics
            },
        )
    )
    of = "CIFAR-10-C" if run.image_size <= corruptions.SMALL else "ImageNet-C"
    protocol = {
        **evaluation_split.protocol(run, train, test),
        "k": evaluation.k,
        "temperature": evaluation.temperature,
        "corruptions": f"{len(names)} at severities 1 to 5, the constants of {of}, applied to evaluation views of {run.image_size} pixels",
        "mean": f"over severities; the row pretrained: over the {len(names)} corruptions",
    }
    return results.save(
        run.path,
        "robustness",
        protocol,
        rows,
        run.about(),
        time.monotonic() - began,
        "k-NN accuracy, %",
    )


@torch.no_grad()
def extract(run: Run, part: Part, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """(features, labels) of the part's images under one corruption; no name: as they are."""
    found, truth, done = [], [], 0
    for images, labels in part.batches():
        numbers = part.numbers[done : done + len(images)]
        done += len(images)
        if name:
            pixels = images.permute(0, 2, 3, 1).numpy()
            corrupted = [
                corruptions.apply(name, image, severity, int(number))
                for image, number in zip(pixels, numbers)
            ]
            images = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
        found.append(run.backbone(features.normalize(run, images)).float())
        truth.append(labels)
    return torch.cat(found), torch.cat(truth).to(run.device)


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.robustness")
