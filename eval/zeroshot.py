"""Zero-shot accuracy: classify images by the nearest name of a class.

The name of each class is put into the templates (text.templates) and embedded by the text tower.
An image belongs to the class whose embedding, the mean over the templates, is most similar to its
own, as in CLIP (Radford et al., ICML 2021, arXiv:2103.00020). The names are those of the folders or
of the data set. The row "raw pixels" is a k-NN classifier that knows the labels of the training
images, and "random, as built" has random weights. The result is printed and saved to
RUN/eval/zeroshot.json.

    python -m ssl_pretrain.eval.zeroshot runs/clip_composites
    # other images and other sentences
    python -m ssl_pretrain.eval.zeroshot runs/clip data.root=/data/birds \
        'text.templates=["a photo of a {}.","a drawing of a {}."]'
    # each rank embeds its share of the images
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.zeroshot runs/clip data.root=/data/birds
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features, knn_search, towers
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run

CUTOFFS = (1, 5)
OPTIONS: dict[str, dict[str, Any]] = {**features.ROWS_OPTION}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.zeroshot", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(run, options.rows),
    )


def evaluate(run: Run, rows: Sequence[str] = features.ROWS) -> dict[str, Any]:
    """Measure the zero-shot accuracy in percent and save it to RUN/eval/zeroshot.json.

    Args:
        run: Run to evaluate.
        rows: Names of the rows, from `features.ROWS`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the method has no text tower, or the images have no labels.
    """
    start = time.monotonic()
    towers.check_method(run, "zero-shot classification")
    train, test = labeled_splits(run, "zero-shot classification")
    table = []
    if "raw" in rows:
        table.append(_measure_raw_pixels(run, train, test))
    for name, is_pretrained in (("random", False), ("pretrained", True)):
        if name in rows:
            row_name = name if is_pretrained else "random, as built"
            table.append(_measure(run, test, row_name, is_pretrained))
    for row in table:
        results.print_progress(row.summary())
    templates = run.config.text.templates
    protocol = describe_splits(run, train, test, has_random_row=False) | {
        "random": "random weights from the run's seed, in both towers",
        "feature": "embedding of the image tower and its projection",
        "text tower": f"{run.config.text_encoder.name}, tokenizer {run.config.text.tokenizer}",
        "classes": f"the mean embedding over {len(templates)} templates per class, such as"
        f" {templates[0]!r}",
        "raw pixels": f"k-NN with the labels of the training images, k {run.config.evaluation.k},"
        f" temperature {run.config.evaluation.temperature:g}",
        "chance": f"{100 / len(test.classes):.2f} % top-1",
        "standard error": "of top-1, sqrt(p (1 - p) / n) over the test images",
    }
    seconds = time.monotonic() - start
    return results.save(run.path, "zeroshot", protocol, table, run.provenance(), seconds)


def _measure(run: Run, test: EvaluationSplit, name: str, is_pretrained: bool) -> results.Row:
    run_towers = towers.build_towers(run, is_pretrained)
    similarities = run_towers.embed_images(test) @ run_towers.embed_classes(test.classes).T
    return results.Row(name, zero_shot_metrics(similarities, torch.from_numpy(test.labels)))


def zero_shot_metrics(similarities: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the top-1 and top-5 accuracy, and the standard error of top-1, in percent.

    Ties count against the image: its class must be more similar than the k-th other class.

    Args:
        similarities: Similarity of each image to each class, (n, num_classes).
        labels: Class of each image, int64 (n,).
    """
    own = similarities.gather(1, labels.to(similarities.device)[:, None])
    num_better = (similarities >= own).sum(1) - 1  # the class itself is counted once
    metrics = {
        f"top-{k}": 100 * (num_better < k).double().mean().item()
        for k in CUTOFFS
        if k < similarities.shape[1]
    }
    return metrics | {"standard error": standard_error(metrics["top-1"], len(labels))}


def standard_error(accuracy: float, num_images: int) -> float:
    """Return the standard error of an accuracy. Both are in percent."""
    return math.sqrt(accuracy * (100 - accuracy) / num_images)


def _measure_raw_pixels(run: Run, train: EvaluationSplit, test: EvaluationSplit) -> results.Row:
    """Return the row of a k-NN classifier on raw pixels, which knows the training labels."""
    evaluation = run.config.evaluation
    classifier = knn_search.KnnClassifier(
        *features.raw_pixels(train.rank_subset),
        len(train.classes),
        knn_search.choose_backend("auto"),
        subtract_mean=True,
    )
    queries = features.embed_split(features.raw_pixels, test)
    votes = [(min(evaluation.k, len(train)), evaluation.temperature)]
    (accuracy,) = classifier.accuracies(*queries, votes)
    return results.Row(
        "raw pixels",
        {"top-1": accuracy, "standard error": standard_error(accuracy, len(test))},
    )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.zeroshot")
