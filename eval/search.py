"""Find the images of an index that are nearest to other images.

INDEX is a folder that `index` wrote. A QUERY is an image file, or a folder, a .zip or anything else
with images. --model names the network that computes their features: the run, the export, the
weights file or timm:<tag> that the index was made with. Another network is refused by the digest of
its weights. Instead of images, --vectors takes a file that `embed` wrote.

    python -m ssl_pretrain.eval.search photos.index cat.jpg dog.jpg --model runs/photos
    python -m ssl_pretrain.eval.search photos.index new_photos/ --model runs/photos --k 3 --json
    python -m ssl_pretrain.eval.search photos.index --vectors new_photos.npz
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_pretrain.data.file_types import is_picture
from ssl_pretrain.data.image_values import to_pixels
from ssl_pretrain.data.replacement import ReplacementLimit
from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.embed import NETWORK_HELP
from ssl_pretrain.eval.embedding import embedding_file, embedding_network
from ssl_pretrain.eval.embedding.vector_index import VectorIndex
from ssl_pretrain.eval.frozen.named_features import POOLED
from ssl_pretrain.schema import POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

DEFAULT_K = 5


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    options = _build_parser().parse_intermixed_args(arguments)
    overrides = [text for text in options.queries if _is_override(text)]
    queries = [text for text in options.queries if not _is_override(text)]
    if bool(queries) == bool(options.vectors):
        raise ValueError("QUERY: give images, or --vectors with a file that `embed` wrote")
    if queries and not options.model:
        raise ValueError(
            "--model: is missing; name the network that the index was made with, to compute the"
            " features of the queries"
        )
    index = VectorIndex.load(options.index)
    if options.vectors:
        embeddings = embedding_file.read(options.vectors)
        index.check_network(embeddings.entries.metadata, str(options.vectors))
        names, vectors = embeddings.entries.names, embeddings.vectors
    else:
        names, vectors = _embed_queries(index, queries, overrides, options)
    names, vectors = _without_unreadable(names, vectors)
    print_neighbors(index, names, vectors, options.k, as_json=options.json)


def print_neighbors(
    index: VectorIndex, names: list[str], vectors: np.ndarray, k: int, *, as_json: bool
) -> None:
    """Print the nearest images of each query, as tables or as one JSON text.

    Args:
        index: Index to search.
        names: Name of each query.
        vectors: Vector of each query, (n, dim).
        k: Number of neighbors.
        as_json: Print JSON.
    """
    rows, scores = index.search_rows(vectors, k)
    answers: list[dict[str, Any]] = []
    for name, query_rows, query_scores in zip(names, rows, scores):
        neighbors = [
            {"id": index.ids[row], "score": round(float(score), 6)}
            | ({"class": index.classes[row]} if index.classes else {})
            for row, score in zip(query_rows, query_scores)
            if row >= 0
        ]
        answers.append({"query": name, "neighbors": neighbors})
    if as_json:
        print(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    measure = {"cosine": "cosine", "ip": "product", "l2": "distance"}[index.facts.metric]
    for item in answers:
        columns = ["", measure, *(["class"] if index.classes else []), "image"]
        lines = [
            [
                str(rank),
                f"{neighbor['score']:.4f}",
                *([neighbor["class"]] if index.classes else []),
                neighbor["id"],
            ]
            for rank, neighbor in enumerate(item["neighbors"], start=1)
        ]
        print(f"{item['query']}\n{_format_rows(columns, lines)}\n")


def _format_rows(header: list[str], rows: list[list[str]]) -> str:
    """Format cells with the numbers flush right and the names flush left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if number < 2 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _embed_queries(
    index: VectorIndex, queries: list[str], overrides: list[str], options: argparse.Namespace
) -> tuple[list[str], np.ndarray]:
    """Return the names and the features of the images that the queries name."""
    network = embedding_network.open_network(options.model, overrides, options.device)
    feature = index.facts.provenance.get("feature", POOLED)
    index.check_network(network.provenance(feature), f"--model {options.model}")
    extractor = network.extractor(feature)
    names: list[str] = []
    features: list[np.ndarray] = []
    for query in queries:
        if Path(query).is_file() and is_picture(query):
            pixels = to_pixels(query, query, network.transform.pixel_format)
            view = network.transform.crop(torch.from_numpy(pixels).permute(2, 0, 1))
            features.append(extractor(view[None]).numpy())
            names.append(query)
            continue
        source, data = embedding_network.open_images(
            query, network.transform.pixel_format, overrides
        )
        for batch in extractor.extract(
            source,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            limit=ReplacementLimit(source, len(source), data.max_replaced),
        ):
            features.append(batch.features.numpy())
            for reason in batch.unreadable.values():
                results.print_progress(f"unreadable: {reason}")
        names += [source.name(number) for number in range(len(source))]
    return names, np.concatenate(features)


def _without_unreadable(names: list[str], vectors: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the queries that have features, without those of unreadable images."""
    is_finite = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1)
    return [name for name, keep in zip(names, is_finite) if keep], vectors[is_finite]


def _is_override(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.search"), description=__doc__
    )
    add = parser.add_argument
    add("index", metavar="INDEX", help="folder that `index` wrote")
    add(
        "queries",
        nargs="*",
        metavar="QUERY",
        help="images, and key=value settings as in `embed`",
    )
    add("--model", metavar="RUN_OR_FILE", help=NETWORK_HELP)
    add("--vectors", type=Path, metavar="FILE", help="queries that `embed` wrote, without --model")
    add(
        "--k",
        type=POSITIVE_INT,
        default=DEFAULT_K,
        help=f"neighbors per query (default: {DEFAULT_K})",
    )
    add("--json", action="store_true", help="print JSON")
    embedding_network.add_options(parser)
    return parser


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.search")
