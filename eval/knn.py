"""Weighted k-NN accuracy of a run's features: `python -m eval.knn RUN`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval import features, parts, results, runs
from eval.results import Row
from eval.runs import Run
from ssl_pretrain import online

HELP = """Weighted k-NN accuracy of a run's frozen features, beside raw pixels and the untrained network.

Each test image takes the class of its k nearest training images, which vote with exp(cosine similarity / temperature).
Nothing is trained and nothing is chosen, so this is the quickest honest measure. The numbers and their protocol are
printed and kept in RUN/eval/knn.json.

    python -m eval.knn runs/demo
    python -m eval.knn runs/demo --k 200 --temperature 0.1     # the protocol often used for CIFAR-10
    python -m eval.knn runs/demo --shifts 1 2                  # and the test images moved by 1 and 2 pixels
    python -m eval.knn runs/demo --split train                 # queries held out of the training part: to choose k
    python -m eval.knn runs/demo data.root=/new/place          # the images have moved"""


def main(arguments: list[str]) -> None:
    parser = runs.parser("eval.knn", HELP)
    parser.add_argument("--k", type=int, help="neighbours that vote (default: evaluation.k of the run)")
    parser.add_argument("--temperature", type=float, help="divides their similarities (default: evaluation.temperature)")
    shifts = "move the test images by N original pixels (default: 1 2 for images under 32 pixels, else none)"
    parser.add_argument("--shifts", type=int, nargs="*", metavar="N", help=shifts)
    parser.add_argument("--split", choices=["val", "train"], default="val", help="queries: test images, or a tenth of the training images")
    parser.add_argument("--backend", choices=["auto", "faiss", "torch"], default="auto", help="both exact; auto: faiss if installed")
    options = parser.parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    result = evaluate(run, options.k, options.temperature, options.shifts, options.split, options.backend)
    print(f"\n{results.text(result)}\n\n{result['seconds']:.0f} s; kept in {run.path / 'eval/knn.json'}")


def evaluate(
    run: Run,
    k: int | None = None,
    temperature: float | None = None,
    shifts: list[int] | None = None,
    split: str = "val",
    backend: str = "auto",
) -> dict[str, Any]:
    """Accuracy in percent of raw pixels, the random backbone and the pretrained one; see HELP. Kept in RUN/eval/knn.json.

    Raises:
        ValueError: the images have no labels, or k does not fit them.
    """
    began = time.monotonic()
    k = run.config.evaluation.k if k is None else k
    temperature = run.config.evaluation.temperature if temperature is None else temperature
    backend = choose(backend)
    train, test = parts.labelled_parts(run, "k-NN", split)
    online.check(k, temperature, len(train))
    shifts = parts.default_shifts(test) if shifts is None else shifts
    moves = {f"shifted {distance}": parts.directions(run, test, distance) for distance in shifts}
    rows = []
    for judged in features.judged(run, train):
        bank, labels = judged.embed(train)
        search = Search(bank, labels, k, temperature, len(train.classes), backend, judged.centred)
        row = Row(judged.name, {"clean": search.accuracy(*judged.embed(test))})
        for column, offsets in moves.items():
            each = [search.accuracy(*judged.embed(test, offset)) for offset in offsets]
            row.metrics[column] = sum(each) / len(each)
        results.say(f"{judged.name}: " + ", ".join(f"{column} {value:.1f} %" for column, value in row.metrics.items()))
        rows.append(row)
    protocol = {
        **parts.protocol(run, train, test, split),
        "normalization": "features scaled to length 1, not centred; raw pixels centred on the training mean first",
        "k": k,
        "temperature": temperature,
        "backend": backend,
        **({"shifts": parts.describe_shifts(run, test, shifts)} if shifts else {}),
    }
    name = "knn" if split == "val" else "knn_train"
    return results.save(run.path, name, protocol, results.with_better_random(rows), run.about(), time.monotonic() - began)


def choose(backend: str) -> str:
    """faiss or torch. Raises ValueError where faiss is asked for and not installed."""
    if backend == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            raise ValueError("--backend faiss: it is not installed; pip install 'ssl_pretrain[faiss]', or take --backend torch") from None
        return "torch"
    return "faiss"


class Search:
    """The bank of training features, ready to be asked: exact cosine search with faiss or torch."""

    def __init__(self, bank: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int, backend: str, centred: bool = False):
        self.mean = bank.mean(dim=0) if centred else bank.new_zeros(1)
        self.bank, self.labels = bank - self.mean, labels
        self.k, self.temperature, self.num_classes = k, temperature, num_classes
        self.index: Any = _faiss_index(F.normalize(self.bank, dim=1)) if backend == "faiss" else None

    def predict(self, queries: Tensor) -> Tensor:
        """The class of each query, (queries,)."""
        queries = queries - self.mean
        if self.index is None:
            return online.weighted_knn(self.bank, self.labels, queries, self.k, self.temperature, self.num_classes)
        found, neighbours = self.index.search(F.normalize(queries, dim=1).cpu().numpy(), self.k)
        similarities = torch.from_numpy(found).to(queries.device)
        return online.vote(similarities, self.labels[torch.from_numpy(neighbours).to(queries.device)], self.temperature, self.num_classes)

    def accuracy(self, queries: Tensor, labels: Tensor) -> float:
        """Percent of the queries whose predicted class is theirs."""
        return 100 * (self.predict(queries) == labels).double().mean().item()


def _faiss_index(bank: Tensor) -> Any:
    import faiss

    index: Any = faiss.IndexFlatIP(bank.shape[1])
    if bank.is_cuda and hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(bank.cpu().numpy())
    return index


if __name__ == "__main__":
    results.command(main, "eval.knn")
