"""The whole network fine-tuned on 1 % and 10 % of the labels: `python -m ssl_pretrain.eval.semi RUN`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import protocols, results, runs
from ssl_pretrain.eval.finetuning import selection
from ssl_pretrain.eval.finetuning.selection import Column, Settings
from ssl_pretrain.eval.frozen import evaluation_split, shards
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.rng import Purpose, permutation
from ssl_pretrain.schema import FROM_ZERO, PERCENT

HELP = """Accuracy of the whole network, trained on few labelled images from a run's weights: 1 % and 10 % of them.

The protocol is SimCLR's (appendix B.5): SGD on crops and flips without any regularization, 60 epochs on 1 %, 30 on 10 %.
The labelled images are those whose file names --subset lists, such as imagenet_subsets/1percent.txt of google-research/simclr;
without it, as many of each class, drawn by --subset-seed. The numbers and their protocol are printed and kept in RUN/eval/semi.json.

    python -m ssl_pretrain.eval.semi runs/demo --rows random pretrained
    python -m ssl_pretrain.eval.semi runs/demo --percent 1 --lrs 0.02 0.05 0.1      # chosen on a tenth of the labelled images
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.semi runs/imagenet --subset 1percent.txt 10percent.txt"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.semi", HELP)
    parser.add_argument(
        "--percent",
        type=PERCENT,
        nargs="+",
        default=[1, 10],
        help="of the training images, labelled (default: 1 10)",
    )
    parser.add_argument(
        "--subset",
        nargs="+",
        metavar="FILE",
        help="lists of file names, one a line, instead of --percent",
    )
    parser.add_argument(
        "--subset-seed", type=FROM_ZERO, default=0, help="of the class-balanced choice (default: 0)"
    )
    selection.add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    with shards.ranks(options.device) as device:
        run = runs.load_run(options.run, options.checkpoint, options.overrides, device)
        result = evaluate(
            run,
            options.percent,
            options.subset,
            options.subset_seed,
            selection.settings_of(options),
        )
        if process_group.is_main():
            print(
                f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/semi.json'}"
            )


def evaluate(
    run: Run,
    percent: list[float] | None = None,
    subsets: list[str] | None = None,
    subset_seed: int = 0,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Accuracy in percent after fine-tuning on few labels; see HELP. Kept in RUN/eval/semi.json.

    Raises:
        ValueError: the images have no labels, a list names none of them, or a percentage leaves a class without an image.
    """
    settings = settings or Settings()
    train, test = evaluation_split.labelled_parts(run, "few-label fine-tuning")
    if subsets:
        chosen = {Path(file).name: listed(train, Path(file)) for file in subsets}
        how = {
            name: f"the {len(rows):,} training images that {name} lists"
            for name, rows in chosen.items()
        }
    else:
        chosen = {
            f"{share:g} %": balanced(train, share, subset_seed) for share in percent or [1, 10]
        }
        how = {
            name: f"{len(rows):,} training images, as many of each class, by seed {subset_seed}"
            for name, rows in chosen.items()
        }
    published = protocols.TUNING["semi"]
    columns = {}
    for name, rows in chosen.items():
        epochs = protocols.SEMI_EPOCHS[1 if len(rows) < 0.05 * len(train) else 10]
        columns[name] = Column(
            rows, selection.departing(replace(published, epochs=epochs), settings, len(rows))
        )
    about = {"source": published.source, **{f"labels, {name}": text for name, text in how.items()}}
    return selection.evaluate(run, "semi", columns, train, test, settings, about)


def balanced(train: Part, percent: float, seed: int) -> np.ndarray:
    """Rows of the training part, sorted: of each class the same number, together about `percent` of all; at least one of each.

    Raises:
        ValueError: the percentage is outside of (0, 100), or a class has fewer images than its share.
    """
    if not 0 < percent < 100:
        raise ValueError(
            f"--percent {percent:g}: give a number between 0 and 100; eval.finetune trains on all"
        )
    num_classes = len(train.classes)
    number = max(1, round(percent / 100 * len(train) / num_classes))
    counts = np.bincount(train.labels, minlength=num_classes)
    if counts.min() < number:
        smallest = train.classes[counts.argmin()]
        raise ValueError(
            f"--percent {percent:g}: that is {number} images of each class, and {smallest!r} has {counts.min()}; give a smaller percentage,"
            " or the choice as a list (--subset FILE)"
        )
    order = permutation(seed, 0, len(train), Purpose.SUBSET)
    return np.sort(
        np.concatenate(
            [order[train.labels[order] == label][:number] for label in range(num_classes)]
        )
    )


def listed(train: Part, file: Path) -> np.ndarray:
    """Rows of the training images whose file name, or path below the class's folder, a line of `file` gives.

    Raises:
        ValueError: the list is absent or empty, or names an image that is not there.
    """
    if not file.is_file():
        raise ValueError(f"--subset {file}: no such file; give a list of file names, one a line")
    names = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    places = {
        Path(train.source.name(int(number))).name: row for row, number in enumerate(train.numbers)
    }
    if not names:
        raise ValueError(f"--subset {file}: the list is empty; give file names, one a line")
    absent = [name for name in names if Path(name).name not in places]
    if absent:
        raise ValueError(
            f"--subset {file}: {len(absent)} of its {len(names)} images are not in {train.source.where} ({', '.join(absent[:3])}"
            f"{', ...' if len(absent) > 3 else ''}); give the list of this data set"
        )
    return np.unique([places[Path(name).name] for name in names])


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.semi")
