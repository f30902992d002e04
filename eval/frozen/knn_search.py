"""Exact nearest-neighbor search by cosine similarity, in a feature bank spread over ranks."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssl_pretrain.distributed import collectives, process_group
from ssl_pretrain.eval.frozen.rank_batches import gather_rows
from ssl_pretrain.monitoring import weighted_knn
from ssl_pretrain.system import optional_packages

QUERY_BATCH_SIZE, BANK_TILE_SIZE = 1024, 16384  # a tile of similarities takes 64 MiB

VoteSettings = tuple[int, float]  # k, and the temperature that divides the similarities


def choose_backend(backend: str) -> str:
    """Return "faiss" or "torch".

    Args:
        backend: "faiss", "torch", or "auto" for faiss if it is installed and torch otherwise.

    Raises:
        ValueError: If `backend` is "faiss" and faiss is not installed.
    """
    if backend == "torch":
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError:
        if backend == "faiss":
            message = optional_packages.missing_message(
                "--backend faiss", "faiss", "faiss", "use --backend torch"
            )
            raise ValueError(message) from None
        return "torch"
    return "faiss"


def required_bytes(
    num_bank_images: int, num_queries: int, dim: int, num_classes: int, view_bytes: int
) -> int:
    """Return an upper bound on the memory that a search takes on one rank, in bytes.

    A rank stores two copies (original and normalized) of all queries and of its rows of the bank.
    It also stores tiles of similarities, votes, and the cached views.
    """
    num_rows = -(-num_bank_images // process_group.world_size()) + num_queries
    num_values = 2 * num_rows * dim + QUERY_BATCH_SIZE * (3 * BANK_TILE_SIZE + num_classes)
    return 4 * num_values + view_bytes


class KnnClassifier:
    """Weighted k-NN classifier over a bank of training features.

    Args:
        bank: This rank's training features, (n, dim). Ranks may have different n.
        labels: Class of each feature, (n,).
        num_classes: Number of classes over all ranks.
        backend: "faiss" or "torch".
        subtract_mean: Subtract the mean of the whole bank from the bank and from the queries.
    """

    def __init__(
        self,
        bank: Tensor,
        labels: Tensor,
        num_classes: int,
        backend: str,
        subtract_mean: bool = False,
    ):
        self.num_classes, self.labels = num_classes, labels
        self.mean = _global_mean(bank) if subtract_mean else None
        self.bank = self._unit_length(bank)
        self.search = _FaissSearch(self.bank) if backend == "faiss" else None

    def accuracies(
        self, queries: Tensor, labels: Tensor, vote_settings: Sequence[VoteSettings]
    ) -> list[float]:
        """Return the percentage of correctly classified queries for each k and temperature."""
        return [
            100 * (predictions == labels).double().mean().item()
            for predictions in self.predict(queries, vote_settings)
        ]

    def predict(self, queries: Tensor, vote_settings: Sequence[VoteSettings]) -> list[Tensor]:
        """Return the predicted class of each query, (queries,), for each k and temperature.

        All settings share one search.
        """
        predictions: list[list[Tensor]] = [[] for _ in vote_settings]
        for similarities, labels in self.neighbors(queries, max(k for k, _ in vote_settings)):
            for batches, (k, temperature) in zip(predictions, vote_settings):
                batches.append(
                    weighted_knn.vote(
                        similarities[:, :k], labels[:, :k], temperature, self.num_classes
                    )
                )
        return [torch.cat(batches) for batches in predictions]

    def neighbors(self, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the similarities and labels of the k nearest neighbors of each batch of queries.

        Both are (batch, k), nearest first, and the same on every rank.
        """
        for batch in queries.split(QUERY_BATCH_SIZE):
            nearest = self._search_own_bank(self._unit_length(batch), min(k, len(self.bank)))
            yield _merge_ranks(*nearest, k)

    def _unit_length(self, vectors: Tensor) -> Tensor:
        if self.mean is not None and len(vectors):
            vectors = vectors - self.mean
        return F.normalize(vectors, dim=1)

    def _search_own_bank(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return similarities and labels, (queries, k), of the nearest rows in this rank's bank."""
        if k == 0:
            return queries.new_empty(len(queries), 0), self.labels.new_empty(len(queries), 0)
        if self.search is not None:
            similarities, rows = self.search(queries, k)
        else:
            similarities, rows = _search_with_torch(queries, self.bank, k)
        return similarities, self.labels[rows]


def _global_mean(bank: Tensor) -> Tensor:
    """Return the mean over all ranks, summed in float64 to be the same for any number of ranks."""
    # On a rank without images the sum is a row of zeros, which the slice removes.
    rank_sum = bank.sum(dim=0, keepdim=True, dtype=torch.float64)[: len(bank)]
    total = gather_rows(rank_sum).sum(dim=0)
    return (total / sum(collectives.gather_objects(len(bank)))).to(bank.dtype)


def _merge_ranks(similarities: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge the nearest neighbors that each rank found in its own rows of the bank.

    Args:
        similarities: Similarities of this rank's neighbors, (queries, at most k), nearest first.
        labels: Their labels, same shape.
        k: Number of neighbors to keep.

    Returns:
        Similarities and labels of the k nearest over all ranks, each (queries, k), nearest first.
    """
    if process_group.world_size() == 1:
        return similarities, labels

    def gather_columns(values: Tensor, padding: float) -> Tensor:
        rank_columns = F.pad(values, (0, k - values.shape[1]), value=padding)
        all_columns = collectives.gather(rank_columns).unflatten(0, (-1, len(rank_columns)))
        return all_columns.transpose(0, 1).flatten(1)

    nearest, columns = gather_columns(similarities, -torch.inf).topk(k, dim=1)
    return nearest, gather_columns(labels, 0).gather(1, columns)


def _search_with_torch(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    nearest = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for first, tile in zip(range(0, len(bank), BANK_TILE_SIZE), bank.split(BANK_TILE_SIZE)):
        similarities, tile_rows = (queries @ tile.T).topk(min(k, len(tile)), dim=1)
        candidates = torch.cat([nearest, similarities], dim=1)
        nearest, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        rows = torch.cat([rows, tile_rows + first], dim=1).gather(1, order)
    return nearest, rows


class _FaissSearch:
    """Exact search with faiss in a bank that is converted or uploaded once.

    No index is built, because it would store a second copy of the bank.
    """

    def __init__(self, bank: Tensor):
        import faiss

        self.faiss: Any = faiss
        self.bank, self.resources = bank.float().contiguous(), None
        if bank.is_cuda and faiss.get_num_gpus():
            # This import lets faiss read CUDA tensors where they are.
            importlib.import_module("faiss.contrib.torch_utils")
            self.resources = faiss.StandardGpuResources()
        else:
            self.array = self.bank.cpu().numpy()

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the similarities and the rows of the k nearest neighbors, (queries, k)."""
        metric = self.faiss.METRIC_INNER_PRODUCT
        if self.resources is not None:
            device = self.bank.device.index or 0
            return self.faiss.knn_gpu(
                self.resources, queries.float(), self.bank, k, metric=metric, device=device
            )
        neighbors = self.faiss.knn(queries.cpu().numpy(), self.array, k, metric=metric)
        similarities, rows = (torch.from_numpy(array).to(queries.device) for array in neighbors)
        return similarities, rows
