r"""Accuracy of the whole network after fine-tuning a run's weights on few labels.

The protocol is SimCLR's (appendix B.5): SGD on crops and flips without any regularization, for 60
epochs with 1 % and 30 epochs with 10 % of the labels. --subset takes files that list the labeled
images, such as imagenet_subsets/1percent.txt of google-research/simclr. Without --subset, the same
number of images per class is drawn with the seed --subset-seed. The result is printed and saved to
RUN/eval/semi.json.

    python -m ssl_pretrain.eval.semi runs/demo --rows random pretrained
    # the learning rate is selected on a tenth of the labeled images
    python -m ssl_pretrain.eval.semi runs/demo --percent 1 --lrs 0.02 0.05 0.1
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.semi runs/imagenet \
        --subset 1percent.txt 10percent.txt
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.eval import command_line, finetuning_protocols
from ssl_pretrain.eval.finetuning import selection
from ssl_pretrain.eval.frozen import few_labels
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit, labeled_splits
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import NON_NEGATIVE_INT, PERCENT

OPTIONS: dict[str, dict[str, Any]] = {
    "--percent": {
        "type": PERCENT,
        "nargs": "+",
        "default": [1, 10],
        "help": "percentages of labeled training images (default: 1 10)",
    },
    "--subset": {
        "nargs": "+",
        "metavar": "FILE",
        "help": "files with one image name per line, instead of --percent",
    },
    "--subset-seed": {
        "type": NON_NEGATIVE_INT,
        "default": 0,
        "help": "seed of the class-balanced choice (default: 0)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser(
            "ssl_pretrain.eval.semi", __doc__, OPTIONS | selection.FINETUNING_OPTIONS
        ),
        arguments,
        lambda run, options: evaluate(
            run,
            selection.finetuning_options(options),
            options.percent,
            options.subset,
            options.subset_seed,
        ),
    )


def evaluate(
    run: Run,
    options: selection.FinetuningOptions,
    percentages: list[float],
    subset_files: list[str] | None = None,
    subset_seed: int = 0,
) -> dict[str, Any]:
    """Measure the accuracy in percent after fine-tuning and save it to RUN/eval/semi.json.

    Args:
        run: Run to evaluate.
        options: Settings to try.
        percentages: Percentages of labeled training images. Each one gets its own column.
        subset_files: Files that list the labeled images, instead of `percentages`.
        subset_seed: Seed of the class-balanced choice.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, a listed image is not one of them, or a percentage
            leaves a class without an image.
    """
    train, test = labeled_splits(run, "few-label fine-tuning")
    if subset_files:
        subsets = {Path(file).name: read_subset(train, Path(file)) for file in subset_files}
        origin = "training images that the file lists"
    else:
        subsets = {
            f"{percent:g} %": draw_labeled_rows(train, percent, subset_seed)
            for percent in percentages
        }
        origin = f"training images, the same number per class, drawn with seed {subset_seed}"
    published_protocol = finetuning_protocols.FINETUNING_PROTOCOLS["semi"]
    protocol_entries, columns = {"source": published_protocol.source}, {}
    for name, rows in subsets.items():
        published_percentage = 1 if len(rows) < 0.05 * len(train) else 10
        epochs = finetuning_protocols.SEMI_EPOCHS[published_percentage]
        protocol = selection.adapt_protocol(
            replace(published_protocol, epochs=epochs), options, len(rows)
        )
        columns[name] = selection.Column(rows, protocol)
        protocol_entries[f"labels, {name}"] = f"{len(rows):,} {origin}"
    return selection.evaluate_columns(run, "semi", columns, train, test, options, protocol_entries)


def draw_labeled_rows(train: EvaluationSplit, percent: float, seed: int) -> np.ndarray:
    """Draw about `percent` % of the rows of the training split, the same number per class.

    The result is sorted and has at least one row per class.

    Raises:
        ValueError: If the percentage is not in (0, 100), or a class has too few images.
    """
    if not 0 < percent < 100:
        raise ValueError(
            f"--percent {percent:g}: give a number between 0 and 100; eval.finetune trains on all"
            " labels"
        )
    num_per_class = max(1, round(percent / 100 * len(train) / len(train.classes)))
    return np.sort(
        few_labels.balanced_rows(
            train.labels, num_per_class, train.classes, seed, f"--percent {percent:g}"
        )
    )


def read_subset(train: EvaluationSplit, file: Path) -> np.ndarray:
    """Return the rows of the training images whose file names a file lists.

    Raises:
        ValueError: If the file is missing or empty, or lists an image outside the training split.
    """
    if not file.is_file():
        raise ValueError(f"--subset {file}: no such file; give a list of file names, one per line")
    names = [Path(line.strip()).name for line in file.read_text().splitlines() if line.strip()]
    if not names:
        raise ValueError(f"--subset {file}: the list is empty; give file names, one per line")
    rows = {
        Path(train.source.name(int(index))).name: row for row, index in enumerate(train.indices)
    }
    if missing := [name for name in names if name not in rows]:
        examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"--subset {file}: {len(missing)} of its {len(names)} images are not in"
            f" {train.source.full_path} ({examples}); give a list for this data set"
        )
    return np.unique([rows[name] for name in names])


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.semi")
