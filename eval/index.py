"""Index the vectors of a file that `embed` wrote, for `search` and `serve`.

EMBEDDINGS is a .npz, .npy, .parquet or .safetensors. INDEX is a new folder with the index of faiss,
the names of the images, and the network that the vectors came from. An index of kind `flat` is
exact. `ivf` only looks into the nearest cells of k-means, and `hnsw` walks along a graph of
neighbors. Their recall is measured: the share of the 10 exact nearest neighbors that they find, for
up to 1,000 vectors of the index as queries. It is printed and saved. The features of unreadable
images are left out.

    python -m ssl_pretrain.eval.index photos.npz photos.index
    python -m ssl_pretrain.eval.index photos.npz photos.index --kind hnsw
"""

from pathlib import Path

import numpy as np

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.embedding import embedding_file, vector_index
from ssl_pretrain.eval.embedding.vector_index import Kind, Metric, VectorIndex
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import program

PER_IMAGE = ("unreadable", "not_finite")  # metadata of embeddings that an index does not keep


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = ArgumentParser(
        program.usage_name("python -m ssl_pretrain.eval.index"), description=__doc__
    )
    add = parser.add_argument
    add("embeddings", metavar="EMBEDDINGS", type=Path, help="file that `embed` wrote")
    add("index", metavar="INDEX", type=Path, help="folder to write, such as photos.index")
    add(
        "--metric",
        choices=vector_index.METRICS,
        default="cosine",
        help="how vectors are compared: cosine (default), ip (inner product) or l2 (squared"
        " Euclidean distance)",
    )
    add(
        "--kind",
        choices=vector_index.KINDS,
        default="flat",
        help="flat (default, exact), ivf or hnsw (faster on millions of vectors)",
    )
    add("--overwrite", action="store_true", help="replace an older index in INDEX")
    options = parser.parse_args(arguments)
    vector_index.import_faiss()
    index = write_index(
        options.embeddings, options.index, options.metric, options.kind, options.overwrite
    )
    facts = index.facts
    print(
        f"{options.index}: {facts.count:,} vectors of {facts.dim:,} numbers, {facts.metric},"
        f" {facts.kind}"
    )
    if facts.kind == "flat":
        print("exact")
    else:
        settings = ", ".join(f"{key} {value}" for key, value in facts.parameters.items())
        print(
            f"recall: {100 * facts.recall:.1f} % of the {vector_index.RECALL_K} exact nearest"
            f" neighbors ({settings})"
        )


def write_index(
    embeddings_path: Path,
    folder: Path,
    metric: Metric = "cosine",
    kind: Kind = "flat",
    overwrites: bool = False,
) -> VectorIndex:
    """Index a file of embeddings and write the index to a folder.

    Args:
        embeddings_path: File that `embed` wrote.
        folder: Folder of the index.
        metric: How vectors are compared.
        kind: Kind of the index.
        overwrites: Replace an older index.

    Raises:
        ValueError: If the file has no vector per image, the folder contains something else, or an
            index that may not be replaced.
    """
    is_index = (folder / vector_index.FACTS_FILE).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_index):
        raise ValueError(f"INDEX: {folder} exists and is no index; give a new folder")
    if is_index and not overwrites:
        raise ValueError(
            f"INDEX: {folder} contains an index; give another folder, or --overwrite to replace it"
        )
    embeddings = embedding_file.read(embeddings_path)
    vectors, entries = embeddings.vectors, embeddings.entries
    if vectors.ndim != 2:
        raise ValueError(
            f"{embeddings_path}: has {vectors.shape[1]:,} vectors per image, and an index takes"
            " one; embed the images with --feature pooled or patch_mean"
        )
    is_finite = np.isfinite(vectors).all(axis=1)
    if num_left_out := int((~is_finite).sum()):
        example = entries.names[int(np.flatnonzero(~is_finite)[0])]
        results.print_progress(
            f"left out: {num_left_out:,} of {len(vectors):,} images have features that are not"
            f" finite, such as {example}"
        )
    rows = np.flatnonzero(is_finite).tolist()
    class_names = entries.class_names() if entries.has_labels else []
    provenance = {key: value for key, value in entries.metadata.items() if key not in PER_IMAGE}
    index = vector_index.build_index(
        vectors[is_finite],
        [entries.names[row] for row in rows],
        metric=metric,
        kind=kind,
        classes=[class_names[row] or "" for row in rows] if class_names else [],
        provenance=provenance | {"embeddings": str(embeddings_path)},
    )
    index.save(folder)
    return index


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.index")
