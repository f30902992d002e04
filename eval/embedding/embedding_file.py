"""Write and read vectors of images with their names, labels and origin.

| ending | content |
|---|---|
| `.npz` | arrays `features`, `names`, `labels` and `classes`, and `metadata`, a JSON text |
| `.npy` | the array; `FILE.npy.json` beside it has the names, labels, classes and metadata |
| `.parquet` | columns `name`, `label`, `class` and `features`; the metadata are in the schema |
| `.safetensors` | tensors `features` and `labels`, and `names`, a JSON text as bytes |

Files are written block by block, so that the vectors need not fit into memory. Labels are only
there if some image has one. An image without a label has -1, or null in a table. The same vectors
give the same bytes.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ssl_pretrain.eval.embedding.embedding_writers import METADATA_KEY, WRITERS, Content, Entries
from ssl_pretrain.system import durable_files, optional_packages

SUFFIXES = tuple(WRITERS)
MAX_NPZ_CHARACTERS = 2**28  # of all names in an .npz, 1 GiB, where each has the longest one's width
REMEDY = "give one that `ssl-pretrain embed` wrote"
# Errors that the readers raise for files of other programs and for damaged ones.
DAMAGES = (
    *(AttributeError, KeyError, IndexError, TypeError, ValueError, EOFError, MemoryError),
    *(NotImplementedError, RecursionError, OSError, SafetensorError),
    *(zipfile.BadZipFile, zlib.error),
)


@dataclass
class Embeddings:
    """Vectors of images, (n, dim) or (n, patches, dim), and what belongs to them."""

    vectors: np.ndarray
    entries: Entries


def check_path(path: Path) -> None:
    """Raise ValueError unless the ending of the path is that of a format which can be written."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"OUT: {path} ends in none of {', '.join(SUFFIXES)}; give a name that does, such as "
            "features.npz"
        )
    if path.suffix == ".parquet":
        optional_packages.require(str(path), "pyarrow", "data", "write an .npz")


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the names would need too much memory in the format of the path."""
    if path.suffix != ".npz":
        return
    lengths = [len(name) for name in names]
    longest = max(lengths, default=0)
    if longest * len(lengths) > MAX_NPZ_CHARACTERS:
        raise ValueError(
            f"OUT: {path} would store {len(lengths):,} names with the {longest:,} characters of "
            "the longest one each; give OUT as .parquet"
        )


def sidecar_path(path: Path) -> Path:
    """Return the path of the JSON file that belongs to a .npy."""
    return path.with_name(f"{path.name}.json")


def write(
    path: Path,
    blocks: Callable[[], Iterable[np.ndarray]],
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    entries: Entries,
) -> None:
    """Write a file of embeddings atomically.

    Args:
        path: File to write.
        blocks: Function that yields the vectors, a few rows at a time.
        row_shape: Shape of the vectors of one image.
        dtype: float32 or float16.
        entries: Names, labels and metadata.

    Raises:
        OSError: If the file cannot be written. An older file is then unchanged, except that an
            older .npy may be removed, because its names are in another file.
        ValueError: If the names are too long for the format.
    """
    check_names(path, entries.names)
    shape = (len(entries.names), *row_shape)
    if path.suffix == ".npy":
        content = {
            "names": entries.names,
            "labels": entries.labels.tolist() if entries.has_labels else None,
            "classes": entries.classes,
            "metadata": entries.metadata,
        }
        # A kill must not leave the new names beside the old vectors.
        path.unlink(missing_ok=True)
        durable_files.sync_folder(path.parent)
        durable_files.replace(sidecar_path(path), f"{json.dumps(content, indent=1)}\n")
    durable_files.replace_by_writing(
        path,
        lambda file: WRITERS[path.suffix](file, Content(blocks(), shape, dtype, entries)),
    )


def read(path: str | Path) -> Embeddings:
    """Read a file of embeddings.

    Raises:
        ValueError: If the file is missing, damaged, or not a file of embeddings.
    """
    path = Path(path)
    _check_readable(path)
    reader = {
        ".npz": _read_npz,
        ".npy": _read_npy,
        ".parquet": _read_parquet,
        ".safetensors": _read_safetensors,
    }[path.suffix]
    try:
        embeddings = reader(path)
        problem = _find_problem(embeddings)
    except DAMAGES as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk or the permissions
        lines = str(error).strip().splitlines()
        problem = "cannot be read as embeddings: " + ": ".join([type(error).__name__, *lines[:1]])
    if problem:
        raise ValueError(f"{path}: {problem}; {REMEDY}") from None
    return embeddings


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file of embeddings, or an empty dict if it has none."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return dict(json.loads(str(file["metadata"])))
        if path.suffix == ".npy":
            content = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
            return dict(content["metadata"])
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            text = (pq.read_schema(path).metadata or {})[METADATA_KEY.encode()]
            return dict(json.loads(text)["metadata"])
        return dict(json.loads(_safetensors_header(path)["__metadata__"][METADATA_KEY])["metadata"])
    except DAMAGES:
        return {}


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {REMEDY}")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: ends in none of {', '.join(SUFFIXES)}; give a file that `ssl-pretrain embed` "
            "wrote"
        )
    if path.suffix == ".parquet":
        optional_packages.require(str(path), "pyarrow", "data", "write an .npz")
    if path.suffix == ".npy" and not sidecar_path(path).is_file():
        raise ValueError(
            f"{path}: {sidecar_path(path).name} is missing, which has the names; copy it beside "
            "the file"
        )


def _entries(
    names: list[str], labels: Any, classes: list[str], metadata: dict[str, Any]
) -> Entries:
    if labels is None:
        labels = np.full(len(names), -1)
    return Entries(list(names), np.asarray(labels, np.int64), list(classes), metadata)


def _find_problem(embeddings: Embeddings) -> str:
    """Return why vectors and entries do not belong together, or an empty string."""
    vectors, entries = embeddings.vectors, embeddings.entries
    if vectors.dtype.kind != "f" or vectors.ndim not in (2, 3):
        return (
            f"has {vectors.dtype} features of shape {tuple(vectors.shape)}, and not float vectors "
            "(n, dim) or (n, patches, dim)"
        )
    if not len(vectors) == len(entries.names) == len(entries.labels):
        return (
            f"has {len(vectors):,} vectors, {len(entries.names):,} names and "
            f"{len(entries.labels):,} labels"
        )
    if entries.has_labels and entries.labels.max() >= len(entries.classes):
        return f"has the label {entries.labels.max()}, and {len(entries.classes):,} classes"
    if not all(isinstance(name, str) for name in entries.names):
        return "has names that are not texts"
    return "" if isinstance(entries.metadata, dict) else "has metadata that are not a JSON object"


def _read_npz(path: Path) -> Embeddings:
    with np.load(path) as file:
        labels = file.get("labels")
        classes = file["classes"].tolist() if "classes" in file else []
        metadata = json.loads(str(file["metadata"])) if "metadata" in file else {}
        names = file["names"].tolist()
        return Embeddings(file["features"], _entries(names, labels, classes, metadata))


def _read_npy(path: Path) -> Embeddings:
    content = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
    vectors = np.load(path, mmap_mode="r")
    return Embeddings(
        vectors,
        _entries(content["names"], content["labels"], content["classes"], content["metadata"]),
    )


def _read_parquet(path: Path) -> Embeddings:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    saved = json.loads((table.schema.metadata or {}).get(METADATA_KEY.encode(), b"{}"))
    values, lengths = table["features"].combine_chunks(), []
    while hasattr(values.type, "list_size"):
        lengths.append(values.type.list_size)
        values = values.flatten()
    vectors = values.to_numpy(zero_copy_only=False).reshape(len(table), *lengths)
    labels = None
    if "label" in table.column_names:
        labels = table["label"].fill_null(-1).to_numpy()
    names = table["name"].to_pylist()
    return Embeddings(
        vectors, _entries(names, labels, saved.get("classes", []), saved.get("metadata", {}))
    )


def _read_safetensors(path: Path) -> Embeddings:
    with safe_open(path, "np") as file:
        saved = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        keys = set(file.keys())
        names = json.loads(file.get_tensor("names").tobytes())
        labels = file.get_tensor("labels") if "labels" in keys else None
        vectors = file.get_tensor("features")
    return Embeddings(
        vectors, _entries(names, labels, saved.get("classes", []), saved.get("metadata", {}))
    )


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError("the header is longer than the file")
        return dict(json.loads(file.read(length)))
