"""Weighted k-NN accuracy of a run's features: `python -m ssl_pretrain.eval.knn RUN`."""

import time
from collections.abc import Sequence
from typing import Any

from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features, knn_search, shards, shifts
from ssl_pretrain.eval.frozen.evaluation_split import (
    MAX_CACHE_BYTES,
    EvaluationSplit,
    describe_splits,
    labeled_splits,
)
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.parallel import memory
from ssl_pretrain.schema import COUNT, FROM_ZERO, POSITIVE

# DINO's grid (Caron et al., ICCV 2021, arXiv:2104.14294; eval_knn.py of facebookresearch/dino).
KS = (10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1)  # DINO and InstDisc use 0.07, CIFAR-10 usually 0.1
NORMALIZATION = (
    "features scaled to length 1, not centered; raw pixels centered on the training mean first"
)
HELP = """Weighted k-NN accuracy of frozen features, beside raw pixels and a random backbone.

Each test image takes the class of its k nearest training images, which vote with
exp(cosine similarity / temperature). Nothing is trained and no hyperparameter is selected, so this
is the quickest reliable measure. The result is printed and saved to RUN/eval/knn.json. The same
search fills RUN/eval/knn_grid.json: k of 10, 20, 100 and 200 by temperatures of 0.07 and 0.1.

    python -m ssl_pretrain.eval.knn runs/demo
    # the protocol often used for CIFAR-10
    python -m ssl_pretrain.eval.knn runs/demo --k 200 --temperature 0.1
    # the test images also shifted by 1 and 2 pixels
    python -m ssl_pretrain.eval.knn runs/demo --shifts 1 2
    # queries held out of the training images, to choose k
    python -m ssl_pretrain.eval.knn runs/demo --split train
    # the images have moved
    python -m ssl_pretrain.eval.knn runs/demo data.root=/new/place
    # each rank embeds and searches its share of the images
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.knn runs/imagenet"""

OPTIONS: dict[str, dict[str, Any]] = {
    "--k": {
        "type": COUNT,
        "help": "number of neighbors that vote (default: the run's evaluation.k)",
    },
    "--temperature": {
        "type": POSITIVE,
        "help": "divisor of the similarities (default: the run's evaluation.temperature)",
    },
    "--shifts": {
        "type": FROM_ZERO,
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
        "help": "both are exact; auto takes faiss if it is installed",
    },
    "--rows": {
        "nargs": "+",
        "choices": features.ROWS,
        "default": features.ROWS,
        "help": "features to evaluate (default: all three)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command line."""
    parser = command_line.parser("ssl_pretrain.eval.knn", HELP, OPTIONS)
    command_line.evaluate_and_print(
        parser,
        arguments,
        lambda run, options: evaluate(
            run,
            options.k,
            options.temperature,
            options.shifts,
            options.split,
            options.backend,
            options.rows,
        ),
    )


def evaluate(
    run: Run,
    k: int | None = None,
    temperature: float | None = None,
    distances: list[int] | None = None,
    queries: str = "val",
    backend: str = "auto",
    rows: Sequence[str] = features.ROWS,
) -> dict[str, Any]:
    """Measure the accuracy in percent of each row's features and save it to RUN/eval/knn.json.

    Args:
        run: Run to evaluate.
        k: Number of neighbors that vote. Default: the run's.
        temperature: Divisor of the similarities. Default: the run's.
        distances: Shifts of the queries, in original pixels. Default: 1 and 2 for small images.
        queries: "val" for the test images, "train" for held-out training images.
        backend: "faiss", "torch" or "auto".
        rows: Features to evaluate, of `features.ROWS`.

    Returns:
        The content of the result file.

    Raises:
        ValueError: If the images have no labels, k does not fit them, or the features do not fit
            into memory.
    """
    began = time.monotonic()
    k = run.config.evaluation.k if k is None else k
    temperature = run.config.evaluation.temperature if temperature is None else temperature
    backend = knn_search.choose_backend(backend)
    train, test = labeled_splits(run, "k-NN", queries)
    weighted_knn.check(k, temperature, len(train))
    check_memory(run, train, test, rows)
    distances = shifts.default_distances(test) if distances is None else distances
    fitting = [each for each in KS if each <= len(train)]
    votes = [(each, divisor) for each in fitting for divisor in TEMPERATURES]
    table, grid = [], []
    for representation in features.representations(run, train, rows):
        embed = representation.embed
        bank, bank_labels = embed(train.rank_share)
        search = knn_search.Search(
            bank, bank_labels, len(train.classes), backend, representation.centered
        )
        accuracy, *accuracies = search.accuracies(
            *shards.embed_split(embed, test), [(k, temperature), *votes]
        )
        row = results.Row(representation.name, {"clean": accuracy})
        for distance in distances:
            shifted = [
                search.accuracies(*shards.embed_split(embed, test, offset), [(k, temperature)])[0]
                for offset in shifts.directions(test, distance)
            ]
            row.metrics[f"shifted {distance}"] = sum(shifted) / len(shifted)
        results.print_progress(row.summary())
        table.append(row)
        names = [f"k {each}, T {divisor:g}" for each, divisor in votes]
        grid.append(results.Row(representation.name, dict(zip(names, accuracies))))
    protocol = describe_splits(run, train, test, queries, "random" in rows)
    protocol["normalization"] = NORMALIZATION
    name, seconds = "knn" if queries == "val" else "knn_train", time.monotonic() - began
    grid_protocol = protocol | {
        "k and temperature": "in each column's name (T); one search, with nothing selected"
    }
    if len(fitting) < len(KS):
        too_large = ", ".join(str(each) for each in KS if each not in fitting)
        grid_protocol["left out"] = f"k {too_large}: there are {len(train)} training images"
    grid = results.with_better_random(grid)
    results.save(run.path, f"{name}_grid", grid_protocol, grid, run.about(), seconds)
    protocol |= {"k": k, "temperature": temperature, "backend": backend}
    if distances:
        protocol["shifts"] = shifts.describe(test, distances)
    table = results.with_better_random(table)
    return results.save(run.path, name, protocol, table, run.about(), seconds)


def check_memory(
    run: Run, train: EvaluationSplit, test: EvaluationSplit, rows: Sequence[str]
) -> None:
    """Print how much memory the search takes beside what is free.

    Raises:
        ValueError: If it does not fit.
    """
    feature_dim: Any = run.backbone.feature_dim
    raw_dim = 3 * min(run.image_size, features.RAW_SIZE) ** 2
    dim = max(raw_dim if row == "raw" else feature_dim for row in rows)
    view_bytes = 0
    if run.device.type == "cpu":
        sizes = [len(split) * 3 * run.image_size**2 for split in (train, test)]
        view_bytes = sum(size for size in sizes if size <= MAX_CACHE_BYTES)
    needed = knn_search.required_bytes(len(train), len(test), dim, len(train.classes), view_bytes)
    held = f"holds at most {needed / memory.GIB:.2f} GiB"
    try:
        free = memory.available(run.device)
    except ValueError:  # neither CUDA nor Linux
        results.print_progress(f"k-NN {held}; how much memory is free is unknown on this system")
        return
    num_ranks = process_group.world_size()
    per_rank = "" if num_ranks == 1 else f" on each of {num_ranks} ranks"
    results.print_progress(f"k-NN {held}{per_rank}, of {free / memory.GIB:.2f} GiB free")
    if needed > memory.USABLE_FRACTION * free:
        narrower = "; --rows pretrained leaves out raw pixels, the widest features"
        raise ValueError(
            f"k-NN of {len(train):,} training and {len(test):,} test images with {dim:,} numbers"
            f" each {held}{per_rank}, more than {memory.USABLE_FRACTION:.0%} of the"
            f" {free / memory.GIB:.2f} GiB free. Use more ranks (torchrun --nproc-per-node N -m"
            " ssl_pretrain.eval.knn ...), or fewer images (data.subset=N)"
            f"{narrower if dim > feature_dim else ''}"
        )


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.knn")
