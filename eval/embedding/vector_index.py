"""A nearest-neighbor index in a folder, which faiss searches.

The folder has three files. `index.faiss` is the index. `ids.json` has the name of each vector, and
its class if there is one. `index.json` has everything else: the metric, the kind, the measured
recall, and the network that computed the vectors.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssl_pretrain import rng
from ssl_pretrain.system import durable_files, optional_packages

INDEX_FILE, IDS_FILE, FACTS_FILE = "index.faiss", "ids.json", "index.json"
Metric = Literal["cosine", "ip", "l2"]
Kind = Literal["flat", "ivf", "hnsw"]
METRICS: tuple[Metric, ...] = ("cosine", "ip", "l2")
KINDS: tuple[Kind, ...] = ("flat", "ivf", "hnsw")
RECALL_K = 10  # neighbors per query whose share in the exact result is the recall
MAX_RECALL_QUERIES = 1000
MIN_CELL_VECTORS = 39  # vectors per cell of an IVF; faiss warns if k-means has fewer
# What queries and index must have in common, by the name that a message uses.
COMPARED = {"weights_sha256": "weights", "feature": "feature", "transform": "transform"}
HNSW_LINKS, HNSW_BUILD_DEPTH, HNSW_SEARCH_DEPTH = 32, 200, 64


@dataclass
class IndexFacts:
    """Content of `index.json`.

    Attributes:
        metric: "cosine" compares directions, "ip" is the inner product, and "l2" the squared
            Euclidean distance, of which a smaller one is nearer.
        kind: "flat" is exact. "ivf" and "hnsw" are approximate.
        dim: Numbers per vector.
        count: Number of vectors.
        provenance: Network, weights, feature and transform of the vectors.
        parameters: Settings of an approximate index.
        recall: Share of the exact 10 nearest neighbors that the index finds, or 1 for "flat".
    """

    metric: Metric
    kind: Kind
    dim: int
    count: int
    provenance: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    recall: float = 1.0


class VectorIndex:
    """Named vectors and the faiss index that searches them. Several threads may search at a time.

    Attributes:
        facts: Metric, kind, size and origin of the vectors.
        ids: Name of each vector, such as the path of its image.
        classes: Class of each vector, or an empty list.
    """

    def __init__(
        self, index: Any, ids: Sequence[str], facts: IndexFacts, classes: Sequence[str] = ()
    ):
        self._index = index
        self.ids, self.facts, self.classes = list(ids), facts, list(classes)

    @classmethod
    def load(cls, folder: str | Path) -> "VectorIndex":
        """Load the index in a folder.

        Raises:
            ValueError: If the folder has no index, a file of it is damaged, or faiss is not
                installed.
        """
        folder = Path(folder)
        missing = [
            name for name in (INDEX_FILE, IDS_FILE, FACTS_FILE) if not (folder / name).is_file()
        ]
        if missing:
            raise ValueError(
                f"{folder}: {', '.join(missing)} is missing; give a folder that `ssl-pretrain "
                "index` wrote"
            )
        faiss = import_faiss()
        try:
            file = FACTS_FILE
            facts = IndexFacts(**json.loads((folder / file).read_text(encoding="utf-8")))
            file = IDS_FILE
            names = json.loads((folder / file).read_text(encoding="utf-8"))
            ids, classes = list(names["ids"]), list(names["classes"])
            file = INDEX_FILE
            index = faiss.read_index(str(folder / file))
        except (KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{folder / file}: is damaged or not of an index ({type(error).__name__}); copy the"
                " folder again, or index the embeddings again with `ssl-pretrain index`"
            ) from None
        if not index.ntotal == len(ids) == facts.count or index.d != facts.dim:
            raise ValueError(
                f"{folder}: {INDEX_FILE} has {index.ntotal:,} vectors of {index.d} numbers, "
                f"{IDS_FILE} {len(ids):,} names, and {FACTS_FILE} says {facts.count:,} "
                f"vectors of {facts.dim}; the files are of different indexes, so write it again"
            )
        return cls(index, ids, facts, classes)

    def save(self, folder: Path) -> None:
        """Write the index to a new folder, or in place of an older index.

        The folder appears only when it is complete.
        """
        faiss = import_faiss()
        temporary = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        faiss.write_index(self._index, str(temporary / INDEX_FILE))
        names = {"ids": self.ids, "classes": self.classes}
        (temporary / IDS_FILE).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
        facts = json.dumps(asdict(self.facts), indent=1, ensure_ascii=False)
        (temporary / FACTS_FILE).write_text(f"{facts}\n", encoding="utf-8")
        for name in (INDEX_FILE, IDS_FILE, FACTS_FILE):
            durable_files.sync(temporary / name)
        durable_files.sync_folder(temporary)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.rename(folder, old)
        os.rename(temporary, folder)
        durable_files.sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.ids)

    def check_network(self, provenance: dict[str, Any], name: str) -> None:
        """Check that queries come from the network, feature and transform of the index.

        Vectors whose origin is unknown are accepted.

        Args:
            provenance: Origin of the queries, from `EmbeddingNetwork.provenance` or a file of
                embeddings.
            name: Name of the network or file, for the message.

        Raises:
            ValueError: If they differ. The cosines would have no meaning.
        """
        expected = self.facts.provenance
        for key, noun in COMPARED.items():
            ours, theirs = expected.get(key), provenance.get(key)
            if ours is None or theirs is None or ours == theirs:
                continue
            shown = [
                str(value)[:12] if key == "weights_sha256" else value for value in (theirs, ours)
            ]
            network = f"{expected.get('network', '')} of {expected.get('origin', '')}".strip()
            raise ValueError(
                f"{name}: has the {noun} {shown[0]}, and the index was made with {shown[1]} "
                f"({network}); give that network, or index the images again with this one"
            )

    def search(self, vectors: np.ndarray, k: int) -> tuple[list[list[str]], list[list[float]]]:
        """Return the ids and the scores of the nearest vectors of each query, nearest first.

        Args:
            vectors: Queries, float32 (n, dim).
            k: Number of neighbors. An approximate index may find fewer.

        Returns:
            For each query the ids of its neighbors, and their cosine, inner product or squared
            distance.

        Raises:
            ValueError: If the vectors have another width, or a value that is not finite.
        """
        rows, scores = self.search_rows(vectors, k)
        is_neighbor = rows >= 0
        ids = [[self.ids[row] for row in query[mask]] for query, mask in zip(rows, is_neighbor)]
        return ids, [query[mask].tolist() for query, mask in zip(scores, is_neighbor)]

    def search_rows(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows, int64 (n, k), and the scores, float32 (n, k), of the nearest vectors.

        A row is -1 if the index found fewer than k.
        """
        if k < 1:
            raise ValueError(f"k: {k} is out of range; give a whole number >= 1")
        if vectors.ndim != 2 or vectors.shape[1] != self.facts.dim:
            raise ValueError(
                f"the queries have shape {tuple(vectors.shape)}, and the index has vectors of "
                f"{self.facts.dim} numbers; give queries of the network and feature of the index"
            )
        scores, rows = self._index.search(
            prepare_vectors(vectors, self.facts.metric), min(k, len(self))
        )
        return rows, scores


def build_index(
    vectors: np.ndarray,
    ids: Sequence[str],
    *,
    metric: Metric = "cosine",
    kind: Kind = "flat",
    classes: Sequence[str] = (),
    provenance: dict[str, Any] | None = None,
) -> VectorIndex:
    """Index vectors, and measure the recall of an approximate index.

    Args:
        vectors: Vectors, (n, dim).
        ids: Name of each vector.
        metric: How vectors are compared.
        kind: "flat", "ivf" (cells of k-means) or "hnsw" (a graph of neighbors).
        classes: Class of each vector, or nothing.
        provenance: Network, weights, feature and transform of the vectors.

    Raises:
        ValueError: If there is no vector or not one per name, a value is not finite, or faiss is
            not installed.
    """
    faiss = import_faiss()
    if not len(vectors):
        raise ValueError("the embeddings have no vector to index; embed some images first")
    if vectors.ndim != 2 or len(ids) != len(vectors):
        raise ValueError(
            f"the embeddings have shape {tuple(vectors.shape)} and {len(ids):,} names, and an "
            "index takes one vector (n, dim) and one name per image; embed the images with "
            "--feature pooled or patch_mean"
        )
    values = prepare_vectors(vectors, metric)
    count, dim = values.shape
    flat = faiss.IndexFlatL2(dim) if metric == "l2" else faiss.IndexFlatIP(dim)
    facts = IndexFacts(metric, kind, dim, count, provenance or {})
    index = flat
    if kind == "ivf":
        num_cells = max(1, min(round(4 * math.sqrt(count)), count // MIN_CELL_VECTORS))
        facts.parameters = {"num_cells": num_cells, "num_probed": max(1, math.ceil(num_cells / 8))}
        code = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFFlat(flat, dim, num_cells, code)
        index.train(values)
        index.nprobe = facts.parameters["num_probed"]
    elif kind == "hnsw":
        facts.parameters = {
            "num_links": HNSW_LINKS,
            "build_depth": HNSW_BUILD_DEPTH,
            "search_depth": HNSW_SEARCH_DEPTH,
        }
        code = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, code)
        index.hnsw.efConstruction = HNSW_BUILD_DEPTH
        index.hnsw.efSearch = HNSW_SEARCH_DEPTH
    index.add(values)
    result = VectorIndex(index, ids, facts, classes)
    if kind != "flat":
        facts.recall = measure_recall(result, values)
    return result


def measure_recall(index: VectorIndex, values: np.ndarray) -> float:
    """Return the share of the exact nearest neighbors that an index finds.

    The queries are random vectors of the index. They are not counted as their own neighbors.

    Args:
        index: Index to measure.
        values: All vectors of the index, in the form of `prepare_vectors`.
    """
    faiss = import_faiss()
    queries = rng.permutation(0, 0, len(values), rng.Purpose.SUBSET)[:MAX_RECALL_QUERIES]
    k = min(RECALL_K + 1, len(values))
    code = faiss.METRIC_L2 if index.facts.metric == "l2" else faiss.METRIC_INNER_PRODUCT
    _, exact = faiss.knn(values[queries], values, k, metric=code)
    rows, _ = index.search_rows(values[queries], k)
    num_exact = num_found = 0
    for query, expected, retrieved in zip(queries, exact, rows):
        neighbors = set(expected.tolist()) - {int(query)}
        num_exact += len(neighbors)
        num_found += len(neighbors & set(retrieved.tolist()))
    return num_found / max(1, num_exact)


def prepare_vectors(vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """Return vectors as faiss takes them, contiguous float32 and of length 1 for the cosine.

    Raises:
        ValueError: If a value is not finite.
    """
    values = np.ascontiguousarray(vectors, np.float32)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(
            f"vector {row} has a value that is not finite, as an unreadable image has; remove that "
            "vector, or index the file with `ssl-pretrain index`, which leaves such vectors out"
        )
    if metric != "cosine":
        return values
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.ascontiguousarray(values / np.maximum(lengths, 1e-12))


def import_faiss() -> Any:
    """Return the module faiss.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError(optional_packages.missing_message("index", "faiss", "faiss")) from None
    return faiss
