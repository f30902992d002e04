"""Exact nearest-neighbor search by cosine similarity, in a bank that is spread over ranks."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen import shards
from ssl_pretrain.monitoring import weighted_knn

QUERIES, TILE = 1024, 16384  # a tile of similarities has 64 MiB

Vote = tuple[int, float]  # k, and the temperature that divides the similarities


def choose_backend(backend: str) -> str:
    """Return "faiss" or "torch". Raise ValueError if faiss is required and not installed."""
    if backend == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            raise ValueError(
                "--backend faiss: it is not installed; pip install 'ssl_pretrain[faiss]', or take"
                " --backend torch"
            ) from None
        return "torch"
    return "faiss"


def required_bytes(
    num_bank: int, num_queries: int, dim: int, num_classes: int, view_bytes: int
) -> int:
    """Return an upper limit of the bytes one rank holds during a search.

    They are its share of the bank twice (as embedded and normalized), all queries twice, tiles of
    similarities, votes, and the cached views.
    """
    bank = -(-num_bank // process_group.world_size()) * dim * 4
    votes = QUERIES * num_classes * 4
    return 2 * bank + 2 * num_queries * dim * 4 + 3 * QUERIES * TILE * 4 + votes + view_bytes


class Search:
    """Weighted k-NN classifier of a bank of training features.

    Args:
        bank: This rank's training features, (n, dim). n may differ from rank to rank.
        labels: Their classes, (n,).
        num_classes: Number of classes on all ranks.
        backend: "faiss" or "torch".
        centered: Subtract the mean of the whole bank from the bank and from the queries.
    """

    def __init__(
        self, bank: Tensor, labels: Tensor, num_classes: int, backend: str, centered: bool = False
    ):
        self.num_classes, self.labels, self.backend = num_classes, labels, backend
        self.mean = _global_mean(bank) if centered else None
        self.bank = self._unit_length(bank)

    def accuracies(self, queries: Tensor, labels: Tensor, votes: Sequence[Vote]) -> list[float]:
        """Return the percentage of correctly classified queries for each vote."""
        return [
            100 * (predicted == labels).double().mean().item()
            for predicted in self.predict(queries, votes)
        ]

    def predict(self, queries: Tensor, votes: Sequence[Vote]) -> list[Tensor]:
        """Return the predicted class of each query, (queries,), for each vote, by one search."""
        predictions: list[list[Tensor]] = [[] for _ in votes]
        for similarities, labels in self.neighbors(queries, max(k for k, _ in votes)):
            for predicted, (k, temperature) in zip(predictions, votes):
                nearest = similarities[:, :k], labels[:, :k]
                predicted.append(weighted_knn.vote(*nearest, temperature, self.num_classes))
        return [torch.cat(predicted) for predicted in predictions]

    def neighbors(self, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield similarities and labels of the k nearest, each (some queries, k), nearest first.

        Together the batches cover all queries in order. They are the same on every rank.
        """
        for some in queries.split(QUERIES):
            similarities, rows = self._search_share(self._unit_length(some), min(k, len(self.bank)))
            yield shards.merge_nearest(similarities, self.labels[rows], k)

    def _unit_length(self, x: Tensor) -> Tensor:
        return F.normalize(x if self.mean is None or not len(x) else x - self.mean, dim=1)

    def _search_share(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return similarities and rows, (queries, k), of the nearest in this rank's bank."""
        if k == 0:
            return queries.new_empty(len(queries), 0), self.labels.new_empty(len(queries), 0)
        search = _search_with_faiss if self.backend == "faiss" else _search_with_torch
        return search(queries, self.bank, k)


def _global_mean(bank: Tensor) -> Tensor:
    """Return the mean over all ranks, summed in float64 to be the same on any number of ranks."""
    # The slice leaves a rank without images with no row instead of a row of zeros.
    rank_sum = bank.sum(dim=0, keepdim=True, dtype=torch.float64)[: len(bank)]
    total = shards.gather_rows(rank_sum).sum(dim=0)
    return (total / sum(collectives.gather_objects(len(bank)))).to(bank.dtype)


def _search_with_torch(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    nearest = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, tile in zip(range(0, len(bank), TILE), bank.split(TILE)):
        similarities, places = (queries @ tile.T).topk(min(k, len(tile)), dim=1)
        candidates = torch.cat([nearest, similarities], dim=1)
        candidate_rows = torch.cat([rows, places + first], dim=1)
        nearest, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        rows = candidate_rows.gather(1, order)
    return nearest, rows


def _search_with_faiss(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search without an index, which would be a second copy of the bank."""
    import faiss

    arrays = queries.cpu().numpy(), bank.cpu().numpy(), k
    if bank.is_cuda and faiss.get_num_gpus():
        similarities, rows = faiss.knn_gpu(
            faiss.StandardGpuResources(),
            *arrays,
            metric=faiss.METRIC_INNER_PRODUCT,
            device=bank.device.index or 0,
        )
    else:
        similarities, rows = faiss.knn(*arrays, metric=faiss.METRIC_INNER_PRODUCT)
    device = queries.device
    return torch.from_numpy(similarities).to(device), torch.from_numpy(rows).to(device)
