"""Weighted k-NN accuracy of a run's features: `python -m ssl_pretrain.eval.knn RUN`, or `torchrun --nproc-per-node 8 -m ssl_pretrain.eval.knn RUN`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import evaluation_split, features, shards
from ssl_pretrain.eval.frozen.evaluation_split import Part
from ssl_pretrain.eval.results import Row
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.parallel import memory
from ssl_pretrain.schema import COUNT, FROM_ZERO, POSITIVE

KS = (
    10,
    20,
    100,
    200,
)  # DINO's grid (Caron et al., ICCV 2021, arXiv:2104.14294; eval_knn.py of facebookresearch/dino)
TEMPERATURES = (0.07, 0.1)  # DINO's and InstDisc's; the one usual for CIFAR-10
QUERIES, TILE = 1024, 16384  # a tile of similarities is 64 MiB
HELP = """Weighted k-NN accuracy of a run's frozen features, beside raw pixels and the untrained network.

Each test image takes the class of its k nearest training images, which vote with exp(cosine similarity / temperature).
Nothing is trained and nothing is chosen, so this is the quickest honest measure. The numbers and their protocol are
printed and kept in RUN/eval/knn.json; the same search gives RUN/eval/knn_grid.json, k of 10, 20, 100 and 200 by
temperatures of 0.07 and 0.1, with nothing chosen among them either.

    python -m ssl_pretrain.eval.knn runs/demo
    python -m ssl_pretrain.eval.knn runs/demo --k 200 --temperature 0.1     # the protocol often used for CIFAR-10
    python -m ssl_pretrain.eval.knn runs/demo --shifts 1 2                  # and the test images moved by 1 and 2 pixels
    python -m ssl_pretrain.eval.knn runs/demo --split train                 # queries held out of the training part: to choose k
    python -m ssl_pretrain.eval.knn runs/demo data.root=/new/place          # the images have moved
    torchrun --nproc-per-node 8 -m ssl_pretrain.eval.knn runs/imagenet      # each rank embeds and searches its share of the images"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("ssl_pretrain.eval.knn", HELP)
    parser.add_argument(
        "--k", type=COUNT, help="neighbours that vote (default: evaluation.k of the run)"
    )
    parser.add_argument(
        "--temperature",
        type=POSITIVE,
        help="divides their similarities (default: evaluation.temperature)",
    )
    shifts = "move the test images by N original pixels (default: 1 2 for images under 32 pixels, else none)"
    parser.add_argument("--shifts", type=FROM_ZERO, nargs="*", metavar="N", help=shifts)
    parser.add_argument(
        "--split",
        choices=["val", "train"],
        default="val",
        help="queries: test images, or a tenth of the training images",
    )
    parser.add_argument(
        "--backend",
        choices=["auto", "faiss", "torch"],
        default="auto",
        help="both exact; auto: faiss if installed",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=features.ROWS,
        default=features.ROWS,
        help="what is judged (default: all three)",
    )
    options = parser.parse_intermixed_args(arguments)
    with shards.ranks(options.device) as device:
        run = runs.load_run(options.run, options.checkpoint, options.overrides, device)
        made = evaluate(
            run,
            options.k,
            options.temperature,
            options.shifts,
            options.split,
            options.backend,
            options.rows,
        )
        if process_group.is_main():
            print(f"\n{results.text(made)}")
            grid = next(
                result
                for result in results.load(run.path)
                if result["name"] == f"{made['name']}_grid"
            )
            folder = run.path / "eval"
            kept = f"every k in {grid['name']}.json, kept in {folder / made['name']}.json"
            print(f"\n{results.text(grid)}\n\n{made['seconds']:.0f} s; {kept}")


def evaluate(
    run: Run,
    k: int | None = None,
    temperature: float | None = None,
    shifts: list[int] | None = None,
    split: str = "val",
    backend: str = "auto",
    rows: Sequence[str] = features.ROWS,
) -> dict[str, Any]:
    """Accuracy in percent of raw pixels, the random backbone and the pretrained one; see HELP. Kept in RUN/eval/knn.json.

    Raises:
        ValueError: the images have no labels, k does not fit them, or the features do not fit into memory.
    """
    began = time.monotonic()
    k = run.config.evaluation.k if k is None else k
    temperature = run.config.evaluation.temperature if temperature is None else temperature
    backend = choose(backend)
    train, test = evaluation_split.labelled_parts(run, "k-NN", split)
    weighted_knn.check(k, temperature, len(train))
    check_memory(run, train, test, rows)
    shifts = evaluation_split.default_shifts(test) if shifts is None else shifts
    moves = {
        f"shifted {distance}": evaluation_split.directions(run, test, distance)
        for distance in shifts
    }
    grid = {
        f"k {each}, T {by:g}": (each, by)
        for each in KS
        if each <= len(train)
        for by in TEMPERATURES
    }
    table, grid_table = [], []
    own_train, own_test = shards.share(train), shards.share(test)
    for judged in features.judged(run, train, rows):
        search = Search(*judged.embed(own_train), len(train.classes), backend, judged.centred)
        queries = shards.embedded(judged.embed, test, own_test)
        clean, *of_grid = search.accuracies(*queries, [(k, temperature), *grid.values()])
        row = Row(judged.name, {"clean": clean})
        for column, offsets in moves.items():
            each = [
                search.accuracies(
                    *shards.embedded(judged.embed, test, own_test, offset), [(k, temperature)]
                )[0]
                for offset in offsets
            ]
            row.metrics[column] = sum(each) / len(each)
        results.say(
            f"{judged.name}: "
            + ", ".join(f"{column} {value:.1f} %" for column, value in row.metrics.items())
        )
        table.append(row)
        grid_table.append(Row(judged.name, dict(zip(grid, of_grid))))
    shared = {
        **evaluation_split.protocol(run, train, test, split, "random" in rows),
        "normalization": "features scaled to length 1, not centred; raw pixels centred on the training mean first",
    }
    protocol = {
        **shared,
        "k": k,
        "temperature": temperature,
        "backend": backend,
        **({"shifts": evaluation_split.describe_shifts(run, test, shifts)} if shifts else {}),
    }
    left_out = [str(each) for each in KS if each > len(train)]
    grid_protocol = {
        **shared,
        "k and temperature": "in each column's name (T); one search, nothing chosen among them",
        **(
            {"left out": f"k {', '.join(left_out)}: there are {len(train)} training images"}
            if left_out
            else {}
        ),
    }
    name = "knn" if split == "val" else "knn_train"
    seconds = time.monotonic() - began
    results.save(
        run.path,
        f"{name}_grid",
        grid_protocol,
        results.with_better_random(grid_table),
        run.about(),
        seconds,
    )
    return results.save(
        run.path, name, protocol, results.with_better_random(table), run.about(), seconds
    )


def choose(backend: str) -> str:
    """faiss or torch. Raises ValueError where faiss is asked for and not installed."""
    if backend == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            raise ValueError(
                "--backend faiss: it is not installed; pip install 'ssl_pretrain[faiss]', or take --backend torch"
            ) from None
        return "torch"
    return "faiss"


def estimate(num_bank: int, num_queries: int, dim: int, num_classes: int, view_bytes: int) -> int:
    """Bytes a rank holds at most: its share of the bank twice (as embedded, of length 1), all queries twice, tiles, and the kept views."""
    bank = -(-num_bank // process_group.world_size()) * dim * 4
    votes = QUERIES * num_classes * 4
    return 2 * bank + 2 * num_queries * dim * 4 + 3 * QUERIES * TILE * 4 + votes + view_bytes


def check_memory(run: Run, train: Part, test: Part, rows: Sequence[str]) -> None:
    """Prints what the search will hold beside what is free.

    Raises:
        ValueError: it does not fit; says what would.
    """
    own: Any = run.backbone.feature_dim
    dim = max(
        3 * min(run.image_size, features.RAW_SIZE) ** 2 if row == "raw" else own for row in rows
    )
    kept = [len(part) * 3 * run.image_size**2 for part in (train, test)]
    views = (
        sum(size for size in kept if size <= evaluation_split.KEPT_BYTES)
        if run.device.type == "cpu"
        else 0
    )
    needed = estimate(len(train), len(test), dim, len(train.classes), views)
    try:
        free = memory.available(run.device)
    except ValueError:  # neither CUDA nor Linux
        results.say(
            f"k-NN holds at most {needed / memory.GIB:.2f} GiB; how much is free cannot be asked here"
        )
        return
    each = (
        "" if process_group.world_size() == 1 else f" on each of {process_group.world_size()} ranks"
    )
    results.say(
        f"k-NN holds at most {needed / memory.GIB:.2f} GiB{each}, of {free / memory.GIB:.2f} GiB free"
    )
    if needed > memory.ROOM * free:
        pixels = "; --rows pretrained leaves out raw pixels, the widest" if dim > own else ""
        raise ValueError(
            f"k-NN of {len(train):,} training and {len(test):,} test images of {dim:,} numbers holds {needed / memory.GIB:.2f} GiB{each},"
            f" more than {memory.ROOM:.0%} of the {free / memory.GIB:.2f} GiB free. Spread it over more ranks"
            f" (torchrun --nproc-per-node N -m ssl_pretrain.eval.knn ...), or take fewer images (data.subset=N){pixels}"
        )


class Search:
    """A bank of training features, ready to be asked: exact cosine search. With several ranks each brings its own rows.

    Args:
        bank: this rank's training features, (n, dim); n may differ from rank to rank.
        labels: their classes, (n,).
        num_classes: of all of them.
        backend: faiss or torch.
        centred: subtract the mean of all ranks' bank from it and from the queries.
    """

    def __init__(
        self, bank: Tensor, labels: Tensor, num_classes: int, backend: str, centred: bool = False
    ):
        self.num_classes, self.labels, self.backend = num_classes, labels, backend
        self.mean = _mean(bank) if centred else None
        self.bank = self._unit(bank)

    def predict(self, queries: Tensor, votes: Sequence[tuple[int, float]]) -> list[Tensor]:
        """The class of each query, (queries,), for each (k, temperature): one search, whose nearest k vote."""
        most = max(k for k, _ in votes)
        found: list[list[Tensor]] = [[] for _ in votes]
        for similarities, labels in self.neighbours(queries, most):
            for predictions, (k, temperature) in zip(found, votes):
                predictions.append(
                    weighted_knn.vote(
                        similarities[:, :k], labels[:, :k], temperature, self.num_classes
                    )
                )
        return [torch.cat(predictions) for predictions in found]

    def accuracies(
        self, queries: Tensor, labels: Tensor, votes: Sequence[tuple[int, float]]
    ) -> list[float]:
        """Percent of the queries whose predicted class is theirs, for each (k, temperature)."""
        return [
            100 * (predicted == labels).double().mean().item()
            for predicted in self.predict(queries, votes)
        ]

    def neighbours(self, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(similarities, labels), each (some queries, k), nearest first, of all queries in order; the same on every rank."""
        for some in queries.split(QUERIES):
            similarities, places = self._own(self._unit(some), min(k, len(self.bank)))
            yield shards.nearest(similarities, self.labels[places], k)

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x if self.mean is None or not len(x) else x - self.mean, dim=1)

    def _own(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of this rank's bank: similarities and places, (queries, k), nearest first."""
        if k == 0:
            return queries.new_empty(len(queries), 0), self.labels.new_empty(len(queries), 0)
        return (
            _by_faiss(queries, self.bank, k)
            if self.backend == "faiss"
            else _by_torch(queries, self.bank, k)
        )


def _mean(bank: Tensor) -> Tensor:
    """Of all ranks' rows, summed in float64, so that the number of ranks does not show in float32."""
    own = bank.sum(dim=0, keepdim=True, dtype=torch.float64)[
        : len(bank)
    ]  # a rank without images adds no row
    total = shards.gather_rows(own).sum(dim=0)
    count = sum(collectives.gather_objects(len(bank)))
    return (total / count).to(bank.dtype)


def _by_torch(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, places, first = (
        queries.new_empty(len(queries), 0),
        torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device),
        0,
    )
    for tile in bank.split(TILE):
        found, at = (queries @ tile.T).topk(min(k, len(tile)), dim=1)
        joined, joined_places = (
            torch.cat([best, found], dim=1),
            torch.cat([places, at + first], dim=1),
        )
        best, order = joined.topk(min(k, joined.shape[1]), dim=1)
        places, first = joined_places.gather(1, order), first + len(tile)
    return best, places


def _by_faiss(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Without an index, which would be a second copy of the bank."""
    import faiss

    asked, among = queries.cpu().numpy(), bank.cpu().numpy()
    if bank.is_cuda and faiss.get_num_gpus():
        resources = faiss.StandardGpuResources()
        found, places = faiss.knn_gpu(
            resources,
            asked,
            among,
            k,
            metric=faiss.METRIC_INNER_PRODUCT,
            device=bank.device.index or 0,
        )
    else:
        found, places = faiss.knn(asked, among, k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found).to(queries.device), torch.from_numpy(places).to(queries.device)


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.knn")
