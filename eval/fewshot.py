"""Accuracy with a few labeled images per class, on several data sets in one table.

The network stays as it is. A classifier of its features learns from 1, 5 and 10 images of each
class, drawn at random several times, and is tested on all test images. Each number is the mean over
the draws, with their standard deviation if there are several. The last columns are the means over
the data sets.

--classifier big_vision, the default, is the few-shot evaluation of the ViT and SigLIP papers:
least squares with a fixed regularization, 3 draws (google-research/big_vision at 0127fb6b,
evaluators/fewshot_lsr.py). Its data sets are Caltech-101, Cars, CIFAR-100, DTD, Pets and UC Merced,
which --data takes as folders. `logistic` is a logistic regression, and `centroid` the nearest class
mean. Raw pixels and a random network are evaluated too. The result is printed and saved to
RUN/eval/fewshot[_CLASSIFIER][_FEATURE].json, without the names of the defaults.

    # the run's own data
    python -m ssl_pretrain.eval.fewshot runs/demo
    python -m ssl_pretrain.eval.fewshot runs/imagenet --data pets=/data/pets dtd=/data/dtd.zip
    python -m ssl_pretrain.eval.fewshot runs/demo --shots 1 5 --draws 10 --classifier centroid
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ssl_pretrain.data.config import DataConfig, locate
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features, few_labels, few_shot, named_features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import POSITIVE_INT

SHOTS = (1, 5, 10)
NUM_DRAWS = 3  # as in big_vision
OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {
        "nargs": "+",
        "default": [],
        "metavar": "NAME=ROOT",
        "help": "data sets with training and test images and labels, as data.root takes them, or"
        " digits (default: the run's own)",
    },
    "--shots": {
        "type": POSITIVE_INT,
        "nargs": "+",
        "default": SHOTS,
        "metavar": "N",
        "help": "labeled images per class (default: 1 5 10)",
    },
    "--draws": {
        "type": POSITIVE_INT,
        "default": NUM_DRAWS,
        "metavar": "N",
        "help": f"draws of the labeled images (default: {NUM_DRAWS})",
    },
    "--classifier": {
        "choices": [*few_shot.CLASSIFIERS],
        "default": "big_vision",
        "help": "classifier, described above (default: big_vision)",
    },
    **features.ROWS_OPTION,
    **named_features.OPTION,
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.fewshot", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(
            run,
            options.data,
            options.shots,
            options.draws,
            options.classifier,
            options.rows,
            options.feature,
        ),
    )


def evaluate(
    run: Run,
    data: Sequence[str] = (),
    shots: Sequence[int] = SHOTS,
    num_draws: int = NUM_DRAWS,
    classifier: str = "big_vision",
    rows: Sequence[str] = features.ROWS,
    feature: str = named_features.POOLED,
) -> dict[str, Any]:
    """Measure the accuracy in percent with few labels and save it.

    The file is RUN/eval/fewshot[_CLASSIFIER][_FEATURE].json, without the names of the defaults.

    Args:
        run: Run to evaluate.
        data: Data sets as NAME=ROOT. Empty for the run's own.
        shots: Numbers of labeled images per class.
        num_draws: Number of draws of the labeled images. With one draw, there is no deviation.
        classifier: Name of the classifier, from `few_shot.CLASSIFIERS`.
        rows: Names of the features to evaluate, from `features.ROWS`.
        feature: Name of the networks' feature, see `named_features`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If an argument is not allowed, a data set has no labels or no test images, or
            the backbone does not have the feature.
    """
    start = time.monotonic()
    _check_arguments(shots, num_draws, classifier)
    named_features.network_of_feature(run.backbone, feature)
    runs = _runs_by_name(run, data)
    table: dict[str, results.Row] = {}
    protocol: dict[str, Any] = {}
    for name, data_run in runs.items():
        train, test = labeled_splits(data_run, f"the few-shot evaluation of {name}")
        entries = describe_splits(data_run, train, test, feature=feature)
        images = entries.pop("images")
        protocol = entries | protocol | {f"images of {name}": images}
        for representation in features.representations(data_run, train, rows, feature):
            row = table.setdefault(representation.name, results.Row(representation.name, {}))
            _measure(row, representation, name, train, test, shots, num_draws, classifier)
            results.print_progress(f"{name}, {row.summary()}")
    if len(runs) > 1:
        for row in table.values():
            _add_means(row, [*runs], shots)
    protocol |= {
        "classifier": few_shot.DESCRIPTIONS[classifier],
        "draws": f"{_describe_draws(num_draws)} of the labeled images, the same for all rows; a"
        " class with fewer images gives all of them",
    }
    suffix = "" if classifier == "big_vision" else f"_{classifier}"
    return results.save(
        run.path,
        f"fewshot{suffix}{results.suffix_of_feature(feature)}",
        protocol,
        results.with_better_random_row([*table.values()]),
        run.provenance(),
        time.monotonic() - start,
        results.measure_of_feature(results.ACCURACY, feature),
    )


def _check_arguments(shots: Sequence[int], num_draws: int, classifier: str) -> None:
    """Raise ValueError unless the arguments of `evaluate` are allowed."""
    if classifier not in few_shot.CLASSIFIERS:
        raise ValueError(
            f"classifier: {classifier!r} is not a classifier; give one of "
            f"{', '.join(few_shot.CLASSIFIERS)}"
        )
    if not shots or min(shots) < 1:
        raise ValueError(
            f"shots: {list(shots)} are not numbers of images; give at least one, each >= 1"
        )
    if num_draws < 1:
        raise ValueError(f"num_draws: {num_draws} is out of range; give a whole number >= 1")


def _describe_draws(num_draws: int) -> str:
    if num_draws == 1:
        return "one fixed draw"
    return f"mean ± standard deviation over {num_draws} fixed draws"


def _measure(
    row: results.Row,
    representation: features.Representation,
    name: str,
    train: EvaluationSplit,
    test: EvaluationSplit,
    shots: Sequence[int],
    num_draws: int,
    classifier: str,
) -> None:
    """Add the accuracies on one data set to a row."""
    train_set, test_set = (
        features.embed_split(representation.embed, split) for split in (train, test)
    )
    num_classes = len(train.classes)
    for shot in shots:
        subsets = [
            few_labels.draw_per_class(train.labels, shot, num_classes, seed)
            for seed in range(num_draws)
        ]
        values = few_shot.accuracies(
            few_shot.CLASSIFIERS[classifier], train_set, test_set, num_classes, subsets
        )
        column = _column(name, shot)
        row.metrics[column] = float(np.mean(values))
        if len(values) > 1:
            row.spread[column] = float(np.std(values, ddof=1))


def _add_means(row: results.Row, names: list[str], shots: Sequence[int]) -> None:
    """Add the mean over the data sets, and the deviation of that mean over the draws."""
    for shot in shots:
        columns = [_column(name, shot) for name in names]
        row.metrics[_column("mean", shot)] = float(np.mean([row.metrics[key] for key in columns]))
        if all(key in row.spread for key in columns):
            # The draws of different data sets are independent.
            variance = sum(row.spread[key] ** 2 for key in columns) / len(columns) ** 2
            row.spread[_column("mean", shot)] = float(np.sqrt(variance))


def _column(name: str, shot: int) -> str:
    return f"{name}, {shot}-shot"


def _runs_by_name(run: Run, data: Sequence[str]) -> dict[str, Run]:
    """Return the run with each data set in place of its own, by the name of the data set."""
    if not data:
        return {run.config.data.source if run.config.data.source != "folder" else "own": run}
    runs = {}
    for text in data:
        name, equals, root = text.partition("=")
        if not equals or not name or not root:
            raise ValueError(f"--data {text}: is not NAME=ROOT; write it like pets=/data/pets")
        if name in runs or name == "mean":
            raise ValueError(f"--data {text}: the name {name} is taken; give another one")
        own = run.config.data
        config = DataConfig(
            **locate(root),
            channels=own.channels,
            range=own.range,
            num_workers=own.num_workers,
            max_replaced=own.max_replaced,
            cache_dir=own.cache_dir,
        )
        runs[name] = replace(run, config=replace(run.config, data=config))
    return runs


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.fewshot")
