"""Compare CLIP's zero-shot accuracy on composites with a classifier that is trained on labels.

PYTHONPATH=. .venv/bin/python launch/pretrain.py configs/clip_composites.yaml
PYTHONPATH=. .venv/bin/python tests/bench/composites.py --train
PYTHONPATH=. .venv/bin/python tests/bench/composites.py --evaluate
PYTHONPATH=. .venv/bin/python tests/bench/composites.py --draw docs/results/composites.png

The first command trains runs/clip_composites and evaluates its last checkpoint. --train trains
runs/composites_labels with the same recipe, but with a linear classifier and the cross entropy of
the labels instead of the text tower and CLIP's loss. --evaluate evaluates the other checkpoints of
both runs. --draw prints the table of docs/results/composites.md and draws its picture.
"""

import argparse
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ssl_pretrain import config as configuration
from ssl_pretrain import train
from ssl_pretrain.checkpoint.folder import list_checkpoints
from ssl_pretrain.eval import captions, results, run_method, runs, zeroshot
from ssl_pretrain.eval.finetuning import trainer
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, labeled_splits
from ssl_pretrain.launch import study_style
from ssl_pretrain.methods.base import Embeddings, LossOutput, Method, MethodConfig
from ssl_pretrain.models.components import Backbone
from ssl_pretrain.views.batch import Batch

RECIPE = Path("configs/clip_composites.yaml")
CLIP_RUN, LABELS_RUN = Path("runs/clip_composites"), Path("runs/composites_labels")
NUM_CLASSES = 10
ACCURACY = "top-1"
RANDOM, PRETRAINED, ON_LABELS = "random, as built", "pretrained", "trained on labels"  # rows
RECALLS = tuple(
    f"{direction}, recall@{k}" for direction in ("image to text", "text to image") for k in (1, 5)
)


@dataclass
class Config(MethodConfig):
    """Configuration of the classifier. A run names this module, as users' methods are named."""

    name: str = "tests.bench.composites"

    def build(self, backbone: Backbone) -> Method:
        """Build the classifier on top of a backbone."""
        return Classifier(self, backbone)


class Classifier(Method):
    """A linear classifier on top of the backbone, both trained by the cross entropy of labels."""

    needs_labels = True

    def __init__(self, config: Config, backbone: Backbone):
        super().__init__(config, backbone)
        self.classifier = nn.Linear(backbone.feature_dim, NUM_CLASSES)

    def forward(self, batch: Batch) -> Embeddings:
        """Return the logits, (local_batch, NUM_CLASSES)."""
        return {"logits": self.classifier(self.backbone(self.single_view(batch)))}

    def targets(self, batch: Batch) -> Embeddings:
        """Return the labels, (local_batch,)."""
        return {"labels": batch.labels}

    def loss(self, embeddings: Embeddings, targets: Embeddings) -> LossOutput:
        """Return the mean cross entropy."""
        loss = F.cross_entropy(embeddings["logits"].float(), targets["labels"])
        return LossOutput(loss, {"cross_entropy": loss})


def train_on_labels() -> None:
    """Train the classifier with the recipe's network, images, views, optimizer and epochs."""
    overrides = [f"output={LABELS_RUN}", "online.knn_every_epochs=0", "evaluation.at_end=[]"]
    recipe = configuration.load(RECIPE, overrides)
    values = configuration.to_dict(recipe) | {"method": {"name": Config.name}}
    config = configuration.from_dict(values, str(RECIPE))
    torch.set_num_threads(config.parallel.threads)
    train.train(config, torch.device("cpu"))


def evaluate() -> None:
    """Evaluate the checkpoints of both runs on the held-out images.

    Checkpoints of CLIP that were evaluated before are skipped.
    """
    torch.set_num_threads(1)
    finished_steps = results.load_by_step(CLIP_RUN).get("captions", {}).keys()
    for run in (load_run(CLIP_RUN, path) for path in list_checkpoints(CLIP_RUN)):
        if run.step not in finished_steps:
            zeroshot.evaluate(run, rows=[PRETRAINED])
            captions.evaluate(run)
    splits = labeled_splits(load_run(CLIP_RUN), "a classifier")
    for split in splits:
        check_captions(split)
    for path in list_checkpoints(LABELS_RUN):
        evaluate_classifier(load_run(LABELS_RUN, path), splits[1])


def load_run(run: Path, checkpoint: Path | None = None) -> runs.Run:
    """Load a run that reads its few test images in this process, which is quicker."""
    return runs.load_run(run, checkpoint, ["data.num_workers=0"])


def check_captions(split: EvaluationSplit) -> None:
    """Check that every caption names the class of its image and no other class.

    A k-NN classifier that copies the class in its neighbors' captions is then one that copies
    their labels, so the row "raw pixels" knows no more than CLIP does.
    """
    source = split.source
    for index in split.indices.tolist():
        for caption in source.texts(index)[0]:
            named = set(re.findall(r"\w+", caption)) & set(split.classes)
            assert named == {split.classes[source.label(index)]}, caption


def evaluate_classifier(run: runs.Run, test: EvaluationSplit) -> None:
    """Measure the accuracy of the trained classifier and save it to RUN/eval/labels.json."""
    start = time.monotonic()
    method = run_method.build_method(run, True, run_method.without_weights(run.config.backbone))
    network = nn.Sequential(method.backbone, method.classifier)
    network = runs.prepare_for_evaluation(network, run.device)
    accuracy = 100 * trainer.accuracy_and_loss(network, test)[0]
    error = zeroshot.standard_error(accuracy, len(test))
    row = results.Row(ON_LABELS, {ACCURACY: accuracy, "standard error": error})
    protocol = {"images": f"{len(test):,} test images", "precision": run.describe_precision()}
    seconds = time.monotonic() - start
    results.save(run.path, "labels", protocol, [row], run.provenance(), seconds)
    results.print_progress(row.summary())


def print_table(
    zero_shot: dict[int, Any], retrieval: dict[int, Any], labels: dict[int, Any]
) -> None:
    """Print the table of all checkpoints, and the baselines of the last one."""
    columns = ["epochs", "zero-shot, %", *(f"{name}, %" for name in RECALLS)]
    columns.append("trained on labels, %")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    last, last_retrieval = last_of(zero_shot), last_of(retrieval)
    random_rows = (_metrics(result, RANDOM) for result in (last, last_retrieval))
    print(_format_row(0, *random_rows, None))
    for step, result in zero_shot.items():
        rows = (_metrics(each, PRETRAINED) for each in (result, retrieval[step]))
        on_labels = _metrics(labels[step], ON_LABELS) if step in labels else None
        print(_format_row(step * epochs_per_step(last), *rows, on_labels))
    print("\n" + results.format_table(*results.table_cells(last)))


def epochs_per_step(last: dict[str, Any]) -> float:
    """Return the epochs per step of a finished run, from the result of its last checkpoint."""
    return configuration.load(RECIPE).epochs / last["step"]


def last_of(by_step: dict[int, Any]) -> dict[str, Any]:
    """Return the result of the last checkpoint."""
    return by_step[max(by_step)]


def _metrics(result: dict[str, Any], row_name: str) -> dict[str, float]:
    (row,) = (row for row in result["rows"] if row["features"] == row_name)
    return row["metrics"]


def _format_row(
    epochs: float,
    zero_shot: dict[str, float],
    retrieval: dict[str, float],
    labels: dict[str, float] | None,
) -> str:
    def with_error(metrics: dict[str, float]) -> str:
        return f"{metrics[ACCURACY]:.1f} ± {metrics['standard error']:.1f}"

    cells = [f"{epochs:g}", with_error(zero_shot), *(f"{retrieval[name]:.1f}" for name in RECALLS)]
    return "| " + " | ".join([*cells, with_error(labels) if labels else ""]) + " |"


def draw(zero_shot: dict[int, Any], labels: dict[int, Any], path: Path) -> None:
    """Draw the accuracies over epochs, with lines for raw pixels and chance."""
    from matplotlib.figure import Figure

    last = last_of(zero_shot)
    figure = Figure(figsize=(6.5, 3.8), layout="constrained", facecolor="white")
    panel = figure.subplots()
    curves = {
        "CLIP, zero-shot": {
            0: _metrics(last, RANDOM),
            **{step: _metrics(result, PRETRAINED) for step, result in zero_shot.items()},
        },
        ON_LABELS: {step: _metrics(result, ON_LABELS) for step, result in labels.items()},
    }
    for number, (label, metrics) in enumerate(curves.items()):
        panel.errorbar(
            [step * epochs_per_step(last) for step in metrics],
            [entry[ACCURACY] for entry in metrics.values()],
            [entry["standard error"] for entry in metrics.values()],
            label=label,
            color=study_style.COLORS[number],
            marker="o",
            markersize=4,
        )
    pixels = _metrics(last, "raw pixels")[ACCURACY]
    study_style.draw_reference(panel.axhline, pixels, study_style.RAW_PIXELS, "k-NN on raw pixels")
    study_style.draw_reference(
        panel.axhline, 100 / NUM_CLASSES, study_style.RANDOM_BACKBONE, "chance"
    )
    study_style.clean(panel, "2,000 held-out composites of digits")
    panel.set_xlabel("epoch")
    panel.set_ylabel("top-1 accuracy, %")
    panel.set_ylim(0, 102)
    panel.set_xlim(left=0)
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="train the classifier on labels")
    parser.add_argument("--evaluate", action="store_true", help="evaluate all checkpoints")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="print the table and draw it")
    options = parser.parse_args()
    if options.train:
        train_on_labels()
    if options.evaluate:
        evaluate()
    if options.draw:
        clip_results = results.load_by_step(CLIP_RUN)
        zero_shot, by_step = clip_results["zeroshot"], results.load_by_step(LABELS_RUN)["labels"]
        labels = {step: by_step[step] for step in zero_shot if step in by_step}  # whole epochs
        print_table(zero_shot, clip_results["captions"], labels)
        draw(zero_shot, labels, options.draw)


if __name__ == "__main__":
    main()
