"""The evaluations by name, for programs. Each has a command line of its own as well."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain.eval import (
    attentive,
    captions,
    corruptions,
    fewshot,
    finetune,
    knn,
    results,
    retrieval,
    robustness,
    segmentation,
    semi,
    sts,
    text_pairs,
    zeroshot,
)
from ssl_pretrain.eval import spectrum as spectrum_module
from ssl_pretrain.eval.finetuning.selection import FinetuningOptions
from ssl_pretrain.eval.frozen import cached_linear, named_features, published_linear
from ssl_pretrain.eval.runs import Run, load_run
from ssl_pretrain.eval.trained_run import SENTENCE_EVALUATIONS, TrainedRun, load_sentence_run


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        name: Name of the evaluation.
        measure: Name and unit of the numbers, such as "accuracy, %".
        table: The numbers, as `table[features][column]`. The features are "raw pixels",
            "random (better of two)", "pretrained", and others.
        protocol: Everything a reader needs to reproduce the numbers.
        path: File that contains all of this.
    """

    name: str
    measure: str
    table: dict[str, dict[str, float]]
    protocol: dict[str, Any]
    path: Path

    def __str__(self) -> str:
        columns = list(dict.fromkeys(name for row in self.table.values() for name in row))
        rows = [
            [features, *(f"{row[name]:.1f}" if name in row else "-" for name in columns)]
            for features, row in self.table.items()
        ]
        return results.format_narrow_table([self.measure, *columns], rows)


def open_and_evaluate(path: Path, name: str, **settings: Any) -> Evaluation:
    """Open the newest checkpoint of a run and run an evaluation of images or of sentences.

    Args:
        path: Folder of the run.
        name: Name of the evaluation, one of `EVALUATIONS`.
        settings: Settings of the evaluation.

    Raises:
        ValueError: If there is no such evaluation or setting, the run has no intact checkpoint, or
            its method or data do not have what the evaluation needs.
    """
    _check_name(name)
    run = load_sentence_run(path) if name in SENTENCE_EVALUATIONS else load_run(path)
    return evaluate(run, name, **settings)


def evaluate(run: TrainedRun, name: str, **settings: Any) -> Evaluation:
    """Run an evaluation and return its result, which is also saved to the run's folder.

    Args:
        run: Run to evaluate.
        name: Name of the evaluation, one of `EVALUATIONS`.
        settings: Settings of the evaluation.

    Raises:
        ValueError: If there is no such evaluation or setting, or the images have no labels.
    """
    _check_name(name)
    function = EVALUATIONS[name]
    allowed = _setting_names(function)
    if unknown := [setting for setting in settings if setting not in allowed]:
        allowed_text = f"choose among: {', '.join(allowed)}" if allowed else "it has none"
        raise ValueError(f"evaluate: {name} has no setting {unknown[0]!r}; {allowed_text}")
    result = function(run, **settings)
    return Evaluation(
        name,
        result["measure"],
        {row["features"]: row["metrics"] for row in result["rows"]},
        result["protocol"],
        run.path / "eval" / result["checkpoint"] / f"{result['name']}.json",
    )


def _check_name(name: str) -> None:
    if name not in EVALUATIONS:
        raise ValueError(
            f"evaluate: {name!r} is not an evaluation; choose one of: {', '.join(EVALUATIONS)}"
        )


def _setting_names(function: Callable[..., dict[str, Any]]) -> list[str]:
    """Return the settings of an evaluation, which are its arguments after the run."""
    if function is segmentation.evaluate:  # takes the fields of two dataclasses
        return segmentation.SETTINGS
    return list(inspect.signature(function).parameters)[1:]


def linear(
    run: Run,
    protocol: str = "cached",
    epochs: int | None = None,
    labels_per_class: Sequence[int] = (),
    rows: Sequence[str] | None = None,
    feature: str | None = None,
) -> dict[str, Any]:
    """Train linear classifiers on frozen features, cached or by a published protocol."""
    arguments: dict[str, Any] = {"rows": rows} if rows else {}  # each protocol has its default
    if protocol == "cached":
        arguments["feature"] = feature or named_features.POOLED
        return cached_linear.evaluate(run, epochs or 50, labels_per_class, **arguments)
    if labels_per_class:
        raise ValueError(
            f"evaluate: linear with protocol {protocol!r} does not take labels_per_class; leave it "
            "out"
        )
    options = published_linear.LinearOptions(protocol_name=protocol, epochs=epochs, feature=feature)
    return published_linear.evaluate(run, options, **arguments)


def fine_tuning(
    run: Run, protocol: str = "simclr", epochs: float | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Train the whole network on all labels."""
    options = FinetuningOptions(epochs=epochs, batch_size=batch_size)
    return finetune.evaluate(run, protocol, options)


def few_label_fine_tuning(
    run: Run,
    percentages: Sequence[float] = (1, 10),
    epochs: float | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Train the whole network on small shares of the labels."""
    options = FinetuningOptions(epochs=epochs, batch_size=batch_size)
    return semi.evaluate(run, options, list(percentages))


def corrupted_images(
    run: Run, corruption_names: Sequence[str] = tuple(corruptions.NAMES), max_images: int = 2000
) -> dict[str, Any]:
    """Measure the accuracy on corrupted test images."""
    return robustness.evaluate(run, list(corruption_names), max_images)


EVALUATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "knn": knn.evaluate,
    "linear": linear,
    "attentive": attentive.evaluate,
    "fewshot": fewshot.evaluate,
    "semi": few_label_fine_tuning,
    "finetune": fine_tuning,
    "retrieval": retrieval.evaluate,
    "robustness": corrupted_images,
    "segmentation": segmentation.evaluate,
    "spectrum": spectrum_module.evaluate,
    "zeroshot": zeroshot.evaluate,
    "captions": captions.evaluate,
    "sts": sts.evaluate,
    "text_pairs": text_pairs.evaluate,
}
