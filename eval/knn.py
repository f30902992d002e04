"""Weighted k-NN accuracy of frozen features, compared with raw pixels and a random backbone.

The k nearest training images of each test image vote for its class with weights
exp(cosine similarity / temperature). Nothing is trained and no hyperparameter is selected, so this
is the quickest reliable measure. The result is printed and saved to RUN/eval/knn.json.
RUN/eval/knn_grid.json has the accuracies for k of 10, 20, 100 and 200 and temperatures of 0.07 and
0.1, from the same search.

    python -m ssl_pretrain.eval.knn runs/demo
    # the protocol often used for CIFAR-10
    python -m ssl_pretrain.eval.knn runs/demo --k 200 --temperature 0.1
    # the test images also shifted by 1 and 2 pixels
    python -m ssl_pretrain.eval.knn runs/demo --shifts 1 2
    # the mean patch token of a vision transformer instead of its pooled output
    python -m ssl_pretrain.eval.knn runs/demo --feature patch_mean
    # queries from held-out training images, to choose k
    python -m ssl_pretrain.eval.knn runs/demo --split train
    # the images have moved
    python -m ssl_pretrain.eval.knn runs/demo data.root=/new/place
    # each rank embeds and searches its share of the images
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.knn runs/imagenet
"""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features, knn_search, named_features
from ssl_pretrain.eval.frozen.evaluation_split import (
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.parallel import memory
from ssl_pretrain.schema import NON_NEGATIVE_INT, POSITIVE_FLOAT, POSITIVE_INT

# DINO's grid (Caron et al., ICCV 2021, arXiv:2104.14294; eval_knn.py of facebookresearch/dino).
GRID_KS = (10, 20, 100, 200)
GRID_TEMPERATURES = (0.07, 0.1)  # DINO and InstDisc use 0.07, most CIFAR-10 papers use 0.1
NORMALIZATION = (
    "features scaled to length 1, not centered; raw pixels centered on the training mean first"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "--k": {
        "type": POSITIVE_INT,
        "help": "number of neighbors that vote (default: the run's evaluation.k)",
    },
    "--temperature": {
        "type": POSITIVE_FLOAT,
        "help": "divisor of the similarities (default: the run's evaluation.temperature)",
    },
    "--shifts": {
        "type": NON_NEGATIVE_INT,
        "nargs": "*",
        "metavar": "N",
        "help": (
            "also shift the test images by N original pixels"
            " (default: 1 2 for images under 32 pixels, else none)"
        ),
    },
    "--split": {
        "choices": ["val", "train"],
        "default": "val",
        "help": "queries: the test images, or a tenth of the training images",
    },
    "--backend": {
        "choices": ["auto", "faiss", "torch"],
        "default": "auto",
        "help": "auto uses faiss if it is installed; both backends are exact",
    },
    **features.ROWS_OPTION,
    **named_features.OPTION,
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    command_line.evaluate_and_print(
        command_line.build_parser("ssl_pretrain.eval.knn", __doc__, OPTIONS),
        arguments,
        lambda run, options: evaluate(
            run,
            options.k,
            options.temperature,
            options.shifts,
            options.split,
            options.backend,
            options.rows,
            options.feature,
        ),
    )


def evaluate(
    run: Run,
    k: int | None = None,
    temperature: float | None = None,
    shift_distances: list[int] | None = None,
    query_split: str = "val",
    backend: str = "auto",
    rows: Sequence[str] = features.ROWS,
    feature: str = named_features.POOLED,
) -> dict[str, Any]:
    """Measure the accuracy in percent of each row's features and save it to RUN/eval/knn.json.

    Args:
        run: Run to evaluate.
        k: Number of neighbors that vote. Default: the run's `evaluation.k`.
        temperature: Divisor of the similarities. Default: the run's `evaluation.temperature`.
        shift_distances: Shifts of the queries, in original pixels. Default: 1 and 2 for small
            images.
        query_split: "val" for the test images, "train" for held-out training images.
        backend: "faiss", "torch" or "auto".
        rows: Names of the features to evaluate, from `features.ROWS`.
        feature: Name of the networks' feature, see `named_features`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, k exceeds the number of training images, the
            backbone does not have the feature, or the search does not fit in memory.
    """
    start = time.monotonic()
    k = run.config.evaluation.k if k is None else k
    temperature = run.config.evaluation.temperature if temperature is None else temperature
    backend = knn_search.choose_backend(backend)
    train, test = labeled_splits(run, "k-NN", query_split)
    weighted_knn.check_arguments(k, temperature, len(train))
    check_memory(run, train, test, rows, feature)
    if shift_distances is None:
        shift_distances = features.default_shift_distances(test)
    grid_ks = [grid_k for grid_k in GRID_KS if grid_k <= len(train)]
    vote_settings = [(k, temperature), *itertools.product(grid_ks, GRID_TEMPERATURES)]
    table, grid = [], []
    for representation in features.representations(run, train, rows, feature):
        row, grid_row = _measure(
            representation, train, test, vote_settings, shift_distances, backend
        )
        results.print_progress(row.summary())
        table.append(row)
        grid.append(grid_row)
    seconds = time.monotonic() - start
    name = "knn" if query_split == "val" else "knn_train"
    name += results.suffix_of_feature(feature)
    measure = results.measure_of_feature(results.ACCURACY, feature)
    protocol = describe_splits(run, train, test, query_split, "random" in rows, feature)
    protocol["normalization"] = NORMALIZATION

    def save(stem: str, entries: dict[str, Any], table_rows: list[results.Row]) -> dict[str, Any]:
        table_rows = results.with_better_random_row(table_rows)
        return results.save(
            run.path, stem, protocol | entries, table_rows, run.provenance(), seconds, measure
        )

    save(f"{name}_grid", _describe_grid(len(train)), grid)
    entries = {"k": k, "temperature": temperature, "backend": backend}
    if shift_distances:
        entries["shifts"] = _describe_shifts(test, shift_distances)
    return save(name, entries, table)


def _measure(
    representation: features.Representation,
    train: EvaluationSplit,
    test: EvaluationSplit,
    vote_settings: list[knn_search.VoteSettings],
    shift_distances: list[int],
    backend: str,
) -> tuple[results.Row, results.Row]:
    """Return the table's row for the first vote settings and the grid's row for all others."""
    embed = representation.embed
    classifier = knn_search.KnnClassifier(
        *embed(train.rank_subset), len(train.classes), backend, representation.needs_centering
    )
    accuracy, *grid_accuracies = classifier.accuracies(
        *features.embed_split(embed, test), vote_settings
    )
    row = results.Row(representation.name, {"clean": accuracy})
    for distance in shift_distances:
        accuracies = [
            classifier.accuracies(*features.embed_split(embed, test, offset), vote_settings[:1])[0]
            for offset in features.shift_offsets(test, distance)
        ]
        row.metrics[f"shifted {distance}"] = sum(accuracies) / len(accuracies)
    columns = [f"k {k}, T {temperature:g}" for k, temperature in vote_settings[1:]]
    return row, results.Row(representation.name, dict(zip(columns, grid_accuracies)))


def _describe_grid(num_train: int) -> dict[str, str]:
    entries = {
        "k and temperature": "in each column's name (T is the temperature), all from one search,"
        " without selection"
    }
    if too_large := [str(k) for k in GRID_KS if k > num_train]:
        entries["left out"] = f"k {', '.join(too_large)}: there are {num_train} training images"
    return entries


def _describe_shifts(test: EvaluationSplit, shift_distances: list[int]) -> str:
    pixels = ", ".join(
        f"{distance} original = {features.shift_offsets(test, distance)[0][0]} evaluation pixels"
        for distance in shift_distances
    )
    return (
        f"queries only, moved right, left, down and up ({4 * len(test)} queries per distance),"
        f" black fill: {pixels}"
    )


def check_memory(
    run: Run,
    train: EvaluationSplit,
    test: EvaluationSplit,
    rows: Sequence[str],
    feature: str = named_features.POOLED,
) -> None:
    """Print how much memory the search takes and how much is free.

    Raises:
        ValueError: If the search does not fit in memory.
    """
    feature_dim = named_features.Feature(run.backbone, feature).feature_dim
    raw_dim = run.config.views.num_channels * math.prod(features.raw_shape(run.image_size))
    dim = max(raw_dim if row == "raw" else feature_dim for row in rows)
    view_bytes = train.cache_bytes + test.cache_bytes if run.device.type == "cpu" else 0
    needed_bytes = knn_search.required_bytes(
        len(train), len(test), dim, len(train.classes), view_bytes
    )
    demand = f"needs up to {needed_bytes / memory.GIB:.2f} GiB"
    try:
        free_bytes = memory.available_bytes(run.device)
    except ValueError:  # neither CUDA nor Linux
        results.print_progress(f"k-NN {demand}; the free memory is unknown on this system")
        return
    num_ranks = process_group.world_size()
    per_rank = "" if num_ranks == 1 else f" on each of {num_ranks} ranks"
    results.print_progress(f"k-NN {demand}{per_rank}; {free_bytes / memory.GIB:.2f} GiB is free")
    if needed_bytes > memory.USABLE_FRACTION * free_bytes:
        rows_hint = "; --rows pretrained leaves out raw pixels, the widest features"
        raise ValueError(
            f"k-NN on {len(train):,} training and {len(test):,} test images with"
            f" {dim:,}-dimensional features {demand}{per_rank}, more than"
            f" {memory.USABLE_FRACTION:.0%} of the {free_bytes / memory.GIB:.2f} GiB free. Use more"
            " ranks (torchrun --nproc-per-node N -m ssl_pretrain.eval.knn ...), or fewer images"
            " (data.subset=N)"
            f"{rows_hint if dim > feature_dim else ''}"
        )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.knn")
